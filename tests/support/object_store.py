"""Starts servers on this machine that speak Google's and Amazon's storage protocols:
gcp-storage-emulator and moto.
"""

import contextlib
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

BUCKET = "bucket"


def environment(gcs_port: int, s3_port: int) -> dict[str, str]:
    """Returns the environment variables with which a process reaches the servers."""
    gcs, s3 = f"http://127.0.0.1:{gcs_port}", f"http://127.0.0.1:{s3_port}"
    return {
        "STORAGE_EMULATOR_HOST": gcs,
        "TENSORSTORE_GCS_HTTP_URL": gcs,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anyone",
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "EPATH_USE_TF": "false",
        "INTERNVL3_JAX_LEASE": "3",
    }


@contextlib.contextmanager
def servers(folder: pathlib.Path):
    """Runs both servers, each with a bucket, until the block ends; yields the environment."""
    gcs_port, s3_port = _free_port(), _free_port()
    programs = pathlib.Path(sys.executable).parent
    gcs = ["gcp-storage-emulator", "start", "--host=127.0.0.1", f"--port={gcs_port}", "--in-memory"]
    s3 = ["moto_server", "-H", "127.0.0.1", "-p", str(s3_port)]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "servers.log").open("wb"))
        for name, *arguments in ([*gcs, f"--default-bucket={BUCKET}"], s3):
            process = stack.enter_context(
                subprocess.Popen([str(programs / name), *arguments], stdout=log, stderr=log)
            )
            stack.callback(process.kill)
        _wait(f"http://127.0.0.1:{gcs_port}/storage/v1/b/{BUCKET}", folder)
        _wait(f"http://127.0.0.1:{s3_port}/moto-api/", folder)
        urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{s3_port}/{BUCKET}", method="PUT")
        ).close()
        yield environment(gcs_port, s3_port)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait(url: str, folder: pathlib.Path) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except OSError as error:
            if time.monotonic() > until:
                raise RuntimeError(
                    f"{url} does not answer: {(folder / 'servers.log').read_text()}"
                ) from error
            time.sleep(0.2)
