"""A run that stops on some devices and resumes on others: the same batches in the same order, the
same losses.
"""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

import train
from internvl3_jax.config import EvalConfig, MeshConfig
from internvl3_jax.parallel import multihost, sharding
from internvl3_jax.training.metrics import MetricsAggregator
from internvl3_jax.training.saver import AsyncSaver
from tests.support.official_run import official_config, write_official
from tests.support.tiny_checkpoint import changed

STEPS = 12
# Devices, how they are used, the step after which the run is stopped there, and where the
# optimizer state is meanwhile.
PLACES = [
    (8, MeshConfig(fsdp=4, tensor=2), 4, "device"),
    (2, MeshConfig(fsdp=1, context=2), 8, "pinned_host"),
    (4, MeshConfig(data=2, fsdp=2), STEPS, "device"),
]


def run(config, workdir, devices, mesh, stop, memory, monkeypatch):
    """Runs up to the step `stop`, where SIGTERM comes."""
    add = MetricsAggregator.add

    def add_and_stop(meter, prepared, metrics):
        add(meter, prepared, metrics)
        meter.steps_seen = getattr(meter, "steps_seen", 0) + 1
        if meter.steps_seen == stop - first:
            os.kill(os.getpid(), signal.SIGTERM)

    saved = (
        sorted(map(int, os.listdir(workdir / "checkpoints")))
        if (workdir / "checkpoints").exists()
        else [0]
    )
    first = saved[-1]
    config = dataclasses.replace(config, mesh=mesh, offload_optimizer=memory == "pinned_host")
    mesh = sharding.make_mesh(mesh, jax.devices()[:devices])
    train.save_config(config, workdir)
    with monkeypatch.context() as patch:
        start = AsyncSaver.save
        patch.setattr(
            AsyncSaver,
            "save",
            lambda self, step, state, *rest: (
                check_memory(state, memory) or start(self, step, state, *rest)
            ),
        )
        if stop < config.steps:
            patch.setattr(MetricsAggregator, "add", add_and_stop)
            with pytest.raises(SystemExit) as ended:
                train.fit(config, workdir, mesh)
            assert ended.value.code == multihost.TERMINATED
        else:
            train.fit(config, workdir, mesh)


def check_memory(state, memory):
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state)} == {memory}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}


def test_a_run_resumes_on_other_devices(tmp_path, monkeypatch):
    config = official_config(write_official(tmp_path))
    data = dataclasses.replace(config.data, rows=8, shards=2, workers=0)
    config = changed(config, data=data, steps=STEPS, checkpoint__every=100, eval=EvalConfig())
    run(config, tmp_path / "whole", 1, MeshConfig(), STEPS, "device", monkeypatch)
    for place in PLACES:
        run(config, tmp_path / "moved", *place, monkeypatch)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "moved")
    ]
    assert [row["step"] for row in logs[1]] == list(range(1, STEPS + 1))
    assert [row["batch"] for row in logs[0]] == [row["batch"] for row in logs[1]]
    losses, norms = (
        [[row[name] for row in rows] for rows in logs] for name in ("loss", "grad_norm")
    )
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-3)
