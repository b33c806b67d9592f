"""One process of tests/test_distributed.py: python distributed_worker.py SCENARIO, its
place in the environment.

PLACE="HOST:PORT COUNT NUMBER" are the arguments of `initialize`; without it the launcher's
variables are found.
"""

import os
import signal
import sys
import time
import traceback

import jax
import jax.numpy as jnp

from internvl3_jax.parallel import multihost, watchdog

SCENARIO = sys.argv[1]
watchdog.HEARTBEAT_S, watchdog.DEAD_AFTER_S, watchdog.LEAVE_WAIT_S = 0.5, 2.0, 6.0
if SCENARIO == "stuck":
    watchdog.STALL_WARN_S = 1.0


def total() -> int:
    """Sums over the devices of all processes, so it waits until every process gets here."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    spread = jax.NamedSharding(mesh, jax.P("all"))
    ones = jax.make_array_from_callback((jax.device_count(),), spread, lambda index: jnp.ones(1))
    return int(jax.jit(jnp.sum, out_shardings=jax.NamedSharding(mesh, jax.P()))(ones))


def slow_down(module, name: str, seconds: float) -> None:
    """Makes a function wait before it does anything."""
    function = getattr(module, name)
    setattr(module, name, lambda *arguments: time.sleep(seconds) or function(*arguments))


def main():
    process, last = jax.process_index(), jax.process_index() == jax.process_count() - 1
    if SCENARIO == "slow end" and process > 0:
        # One reads the error late, the other is late to exit after all have read it.
        slow_down(*((os, "_exit", 2) if last else (traceback, "print_exception", 3)))
    print("sum", total(), flush=True)
    multihost.assert_same_on_all_hosts(1, {"batch": "4x64", "config": "abc"})
    if SCENARIO == "sigterm":
        with multihost.preemption_signal() as stops:
            for step in range(2, 10**6):
                multihost.report_step(step)
                if step % 10 == 0:
                    multihost.assert_same_on_all_hosts(step, {"batch": "4x64"})
                if step == 20 and last:
                    os.kill(os.getpid(), signal.SIGTERM)
                if stops(step):
                    print("stops at", step, flush=True)
                    sys.exit(multihost.TERMINATED)
    elif SCENARIO in ("differs", "slow end"):
        multihost.assert_same_on_all_hosts(
            3 if process == 1 else 2, {"batch": "8x64" if last else "4x64", "config": "abc"}
        )
    elif SCENARIO == "late":
        if last:
            time.sleep(60)
        multihost.assert_same_on_all_hosts(1200, {}, seconds=1)
    elif SCENARIO == "stuck":
        multihost.report_step(4 if last else 5)
        time.sleep(60)
    elif last and SCENARIO == "raises":
        sys.exit("error: data.jsonl row 7: the image is damaged")
    elif SCENARIO in ("killed", "coordinator") and process == (
        0 if SCENARIO == "coordinator" else 1
    ):
        os.kill(os.getpid(), signal.SIGKILL)
    print("sum", total(), flush=True)


if __name__ == "__main__":
    coordinator, count, number = os.environ.get("PLACE", " -1 -1").split(" ")
    start, give_up = 2 if SCENARIO == "missing" else 100, 2 if SCENARIO == "stuck" else 100
    multihost.initialize(
        coordinator,
        int(count),
        int(number),
        start_seconds=start,
        heartbeat_seconds=10,
        give_up_seconds=give_up,
    )
    with multihost.abort_together():
        main()
