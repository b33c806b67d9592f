"""An engine that answers from the goldens of a pack, with numpy alone: a program for
`check --engine command`. Arguments: folder of the pack's model, and "frame_label" to spoil that.
"""

import json
import pathlib
import sys

import numpy as np


def main() -> None:
    folder, fault = pathlib.Path(sys.argv[1]), sys.argv[2:]
    for line in sys.stdin:
        request = json.loads(line)
        with np.load(folder / f"{request['case']}.npz") as file:
            arrays = dict(file)
        with np.load(request["inputs"]) as file:
            assert np.array_equal(file["token_ids"], arrays["token_ids"])
        texts = json.loads((folder / f"{request['case']}.json").read_text())["texts"]
        if fault == ["frame_label"]:
            texts["rendered"] = texts["rendered"].replace("Frame-", "Frame")
        np.savez(request["output"], **arrays)
        print(json.dumps({"output": request["output"], **texts}), flush=True)


if __name__ == "__main__":
    main()
