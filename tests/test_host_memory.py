"""On CPUs the memory that XLA frees stays in the process."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource
import numpy as np
import jax, jax.numpy as jnp
from internvl3_jax.parallel.host_memory import keep_freed_memory

kept = KEPT and keep_freed_memory()
x = jnp.ones((2500, 2500))  # 25 MB
step = jax.jit(lambda x: ((x + 1) @ x[:, :8], (x + 2) @ x[:, 8:16]))
faults = []
for _ in range(41):
    jax.block_until_ready(step(x))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(int(kept), faults[-1] - faults[0])
"""


def run(program: str, **environment) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_calls_take_the_pages_of_earlier_ones():
    _, fresh = run(PROGRAM.replace("KEPT", "False"), JAX_PLATFORMS="cpu")
    kept, again = run(PROGRAM.replace("KEPT", "True"), JAX_PLATFORMS="cpu")
    assert kept == 1
    # Something small can be put into a freed block: then one call needs new pages.
    assert again < fresh / 5


def test_hosts_of_accelerators_are_left_alone():
    program = "import jax; from internvl3_jax.parallel import host_memory as h; "
    program += "print(int(h.is_cpu_only()), int(h.keep_freed_memory()))"
    assert run(program, JAX_PLATFORMS="cuda") == [0, 0]
    assert run(program, JAX_PLATFORMS="cpu")[0] == 1
