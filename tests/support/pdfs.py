"""Writes small PDFs: pages that are images, empty ones, encrypted ones; damages files."""

import io
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image


def image_pdf(images: Sequence[Image.Image]) -> bytes:
    """Returns a PDF with a page of the size of each image, a point being a pixel."""
    file = io.BytesIO()
    first, *rest = [image.convert("RGB") for image in images]
    first.save(file, "PDF", save_all=True, append_images=rest, resolution=72)
    return file.getvalue()


def plain_pdf(*pages: str, trailer: str = "") -> bytes:
    """Returns a PDF of pages without content. pages: entries of each, such as its /MediaBox."""
    kids = " ".join(f"{number + 3} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        *(f"<< /Type /Page /Parent 2 0 R {page} >>" for page in pages),
    ]
    data, offsets = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{content}\nendobj\n".encode()
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    return (
        data
        + (
            f"xref\n0 {size}\n0000000000 65535 f \n{table}"
            f"trailer\n<< /Size {size} /Root 1 0 R {trailer} >>\nstartxref\n{len(data)}\n%%EOF\n"
        ).encode()
    )


def encrypted_pdf() -> bytes:
    """Returns a PDF that no empty password opens."""
    code = "ab" * 32
    return plain_pdf(
        "/MediaBox [0 0 100 100]",
        trailer=f"/ID [<00><00>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{code}> "
        f"/U <{code}> >>",
    )


def write(path: pathlib.Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def damaged(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yields copies of a file with bytes changed, cut out, or missing at the end."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = np.frombuffer(data, np.uint8).copy()
        way = rng.integers(4)
        if way == 0:
            changed = changed[: rng.integers(1, len(changed))]
        elif way == 1:
            start = int(rng.integers(len(changed) - 1))
            changed = np.delete(changed, slice(start, start + int(rng.integers(1, 900))))
        places = rng.integers(0, len(changed), int(rng.choice([1, 3, 30, 300])))
        changed[places] = rng.integers(0, 256, len(places))
        yield changed.tobytes()
