"""infer.py as an engine of `check --engine command`: one process of it per case."""

import json
import pathlib
import subprocess
import sys

import numpy as np

from tests.support import compilation_cache

ROOT = pathlib.Path(__file__).resolve().parents[2]


def arguments(request: dict) -> list[str]:
    """Returns the flags of infer.py for a case; its frames are all images of a folder."""
    found = [f"--checkpoint={request['checkpoint']}", f"--prompt={request['question']}", "--json"]
    found += [f"--max_new_tokens={request['max_new_tokens']}", "--dtype=float32"]
    found += [f"--image={path}" for path in request["images"]]
    if request["frames"]:
        folder = pathlib.Path(request["frames"][0]).parent
        found += [f"--video={folder}", f"--num_frames={len(request['frames'])}"]
    found += [f"--delta={request['delta']}"] if request["delta"] else []
    return [*found, f"--compilation_cache={compilation_cache.FOLDER}"]


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        command = [sys.executable, str(ROOT / "infer.py"), *arguments(request)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(json.dumps({"error": f"status {done.returncode}"}), flush=True)
            continue
        row = json.loads(done.stdout)
        arrays = {"prompt_tokens": row["prompt_tokens"], "answer_ids": row["token_ids"]}
        if row["tiles"]:
            arrays["tile_counts"] = row["tiles"]
        np.savez(request["output"], **{name: np.asarray(value) for name, value in arrays.items()})
        print(json.dumps({"output": request["output"], "answer": row["text"]}), flush=True)


if __name__ == "__main__":
    main()
