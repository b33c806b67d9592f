"""Peak memory of the processes that load one checkpoint together, each its own devices' part of it,
under a limit on their memory.

    python benchmarks/sharded_load.py                          the 1B model in bfloat16 (1.88 GB), 4 processes of 2 CPU devices
    python benchmarks/sharded_load.py --limit_gib 1.5          each process may hold that much data; beyond, the system refuses it memory
    python benchmarks/sharded_load.py --processes 1 --devices 1     to compare with

From safetensors of the original layout and from Orbax. Random weights. The devices' memory is the
process's on a CPU, so a process needs its share of the parameters, one tensor of the files (the
embedding, 272 MB), and what Python and jax take themselves, which is measured, too.
"""

import argparse
import datetime
import json
import os
import pathlib
import resource
import socket
import subprocess
import sys
import tempfile

from convert_1b import machine, write_random

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "sharded_load.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1b")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--devices", type=int, default=2, help="of each process (2)")
    parser.add_argument(
        "--limit_gib", type=float, default=0.0, help="of data a process may hold; 0: no limit"
    )
    parser.add_argument("--role", nargs=3, help=argparse.SUPPRESS)  # directory, number, coordinator
    options = parser.parse_args()
    if options.role:
        print(json.dumps(load_part(options, *options.role)))
        return
    with tempfile.TemporaryDirectory() as folder:
        released, ours = pathlib.Path(folder) / "released", pathlib.Path(folder) / "orbax"
        write_random(released, options.size)
        subprocess.run(
            [sys.executable, "-m", "convert", released, ours],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        bytes_ = sum(path.stat().st_size for path in released.glob("*.safetensors"))
        rows = {
            kind: together(options, path)
            for kind, path in (("safetensors", released), ("orbax", ours))
        }
    for kind, processes in rows.items():
        for number, row in enumerate(processes):
            print(
                f"{kind:<12} process {number}: peak {row['peak_gib']:.2f} GiB, of which {row['before_gib']:.2f} before loading"
            )
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    report |= {
        "settings": {name: value for name, value in vars(options).items() if name != "role"},
        "checkpoint_bytes": bytes_,
    }
    earlier = json.loads(RESULT.read_text()) if RESULT.exists() else []
    kept = [run for run in earlier if run["settings"] != report["settings"]]
    RESULT.write_text(json.dumps([*kept, report | {"processes": rows}], indent=1) + "\n")


def together(options, path: pathlib.Path) -> list[dict]:
    """Starts the processes; what each of them measured."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(options.devices),
        "PYTHONPATH": paths,
    }
    running = [
        subprocess.Popen(
            [
                sys.executable,
                __file__,
                *sys.argv[1:],
                "--role",
                str(path),
                str(number),
                coordinator,
            ],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(options.processes)
    ]
    outs = [process.communicate()[0] for process in running]
    if failed := [number for number, process in enumerate(running) if process.returncode]:
        sys.exit(f"processes {failed} failed; what they said is above")
    return [json.loads(out.splitlines()[-1]) for out in outs]


def load_part(options, path: str, number: str, coordinator: str) -> dict:
    """Loads the part of one process, and checks that it is the part that it should have."""
    import jax
    from cpu_peer_sides import peak_bytes, reset_peak

    from internvl3_jax import load
    from internvl3_jax.config import MeshConfig
    from internvl3_jax.parallel import multihost, sharding

    if options.processes > 1:
        multihost.initialize(coordinator, options.processes, int(number))
    mesh = sharding.make_mesh(MeshConfig())
    if options.limit_gib:
        # Of what is written to, not of what is mapped: jax reserves far more addresses than it
        # uses.
        resource.setrlimit(
            resource.RLIMIT_DATA, (int(options.limit_gib * 2**30), resource.RLIM_INFINITY)
        )
    reset_peak()  # a child begins with its parent's
    before = peak_bytes() / 2**30
    params = load(path, mesh=mesh).params
    held = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
    )
    return {"before_gib": before, "peak_gib": peak_bytes() / 2**30, "held_gib": held / 2**30}


if __name__ == "__main__":
    main()
