"""Converts the shipped digits model and serves a page to ask it about images (`make demo-web`).

    python examples/demo_web.py [--output demo_output] [--port 8000]

The page is at the address that is printed; Ctrl-C ends it.
"""

import argparse
import os
import pathlib
import sys

from rich.console import Console

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.demo import MODEL, convert_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=ROOT / "demo_output",
        help="folder of the converted checkpoint",
    )
    parser.add_argument("--port", type=int, default=8000, help="of the page")
    options = parser.parse_args()
    try:
        checkpoint = convert_model(MODEL, options.output / "checkpoint", Console())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    os.chdir(ROOT)
    arguments = ["--checkpoint", checkpoint, "--critic", checkpoint, "--port", options.port]
    arguments += ["--web", "--web_examples", MODEL / "questions.jsonl", "--model_name", "digits"]
    arguments += ["--max_length", 2048]
    command = [sys.executable, "-m", "internvl3_jax.serve", *map(str, arguments)]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
