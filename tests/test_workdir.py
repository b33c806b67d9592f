"""A run's directory: what may be in it, whose it is, and which configuration it binds."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from internvl3_jax.config import ConfigError, to_dict
from internvl3_jax.io.safe_files import FileError, InUse
from internvl3_jax.training import run_log, workdir
from internvl3_jax.training.history import farewell, is_finished
from tests.support.tiny_checkpoint import changed, train_config

pytestmark = pytest.mark.smoke


# --- the directory -------------------------------------------------------------------------------


def test_a_place_where_no_run_can_be_is_refused_before_anything(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, message in (
        ("", "--workdir is ''"),
        (str(tmp_path / "file"), "file: is a file"),
        (str(tmp_path / "file" / "run"), "file: is a file"),
        (str(tmp_path / "dangling"), "dangling: is a link to .*nowhere, which does not exist"),
        (f"{tmp_path}/{'x' * 300}", "cannot be a --workdir .File name too long"),
        ("~nobody-of-this-name/run", "cannot be a --workdir"),
    ):
        with pytest.raises(FileError, match=message):
            workdir.named(name)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file"]


def test_checkpoints_that_cannot_hold_steps_are_refused_before_anything(tmp_path):
    workdir.named(str(tmp_path))
    for make in (
        os.mkfifo,
        lambda path: path.write_text("mine"),
        lambda path: path.symlink_to("x"),
    ):
        make(tmp_path / "checkpoints")
        with pytest.raises(FileError, match="checkpoints: is not a directory, so no step can be"):
            workdir.named(str(tmp_path))
        (tmp_path / "checkpoints").unlink()
    (tmp_path / "checkpoints").mkdir()
    workdir.named(str(tmp_path))


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert workdir.named("~/runs/a") == tmp_path / "runs" / "a"


def test_one_process_has_it_at_a_time(tmp_path):
    """The second names who has it; a holder that is killed leaves nothing behind."""
    place = tmp_path / "a [1] run"
    code = "import sys, time, pathlib; from internvl3_jax.training.workdir import held\nwith held(pathlib.Path(sys.argv[1])):\n"
    code += "    print('held', flush=True); time.sleep(600)"
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(workdir.__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", code, place], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(
                InUse, match=rf"run is in use by another process .process {process.pid} on .*"
            ),
            workdir.held(place),
        ):
            pass
        process.kill()
    for _ in range(2):
        with workdir.held(place):
            assert os.listdir(place) == [workdir.LOCK]


# --- the configuration ---------------------------------------------------------------------------


def test_a_configuration_binds_once_there_is_a_checkpoint(tmp_path):
    config = train_config()
    workdir.save_config(config, tmp_path)
    other = changed(config, optimizer__learning_rate=1e-4)
    assert workdir.same_run(other, tmp_path, None) == other
    with pytest.raises(
        ConfigError,
        match="another configuration .*optimizer.learning_rate is 0.003 in the run, 0.0001 in the config",
    ):
        workdir.same_run(other, tmp_path, 4)
    assert workdir.same_run(changed(config, logging__every=7), tmp_path, 4).logging.every == 7


def test_a_configuration_saved_before_a_field_was_there(tmp_path):
    """The field has had its default all the time; another value is another configuration."""
    config, path = train_config(), tmp_path / "config.json"
    workdir.save_config(config, tmp_path)
    saved = json.loads(path.read_text())
    del (
        saved["loss"],
        saved["data"]["pairs"],
        saved["offload_optimizer"],
        saved["optimizer"]["warmup_fraction"],
    )
    path.write_text(json.dumps(saved))
    assert workdir.same_run(config, tmp_path, 4) == config
    with pytest.raises(ValueError, match=r"data.pairs is False in the run, True in the config"):
        workdir.same_run(
            changed(config, data=dataclasses.replace(config.data, pairs=True)), tmp_path, 4
        )


@pytest.mark.parametrize("content, message", [
    (b"", "config.json: is not JSON .the file is empty"),
    (b'{"model": ', "config.json: is not JSON"),
    (b"\xff\xfe{", "config.json: is UTF-16"),
    (b"[]", "config.json: is not the configuration of a training run"),
    (b'{"architectures": ["InternVLChatModel"]}', "config.json: is not the configuration of a training run"),
    (b'{"model": 3, "data": {}, "optimizer": {}, "steps": 3}', "config.json: model is the number 3; expected an object"),
])  # fmt: skip
def test_what_is_no_configuration_is_named_and_stays(tmp_path, content, message):
    """Whether torn or another program's: nothing is written over it."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for newest in (None, 4):
        with pytest.raises(FileError, match=message):
            workdir.same_run(train_config(), tmp_path, newest)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": "x"}, "config.json: steps is the text 'x'; expected a whole number"),
        ({"data": {"rows": []}}, r"config.json: data.rows is the list \[\]; expected a whole"),
        ({"model": {"vision": []}}, r"config.json: model.vision is the list \[\]; expected an"),
        ({"optimizer": {"freeze": 1}}, "config.json: optimizer.freeze is the number 1; expected"),
    ],
)
def test_a_saved_setting_of_a_wrong_type_is_named(tmp_path, changes, message):
    values = {"model": {}, "data": {}, "optimizer": {}, "steps": 3} | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    for newest in (None, 4):
        with pytest.raises(FileError, match=message):
            workdir.same_run(train_config(), tmp_path, newest)


def test_a_setting_that_does_not_exist_is_named(tmp_path):
    """As a flipped bit in the file's names makes one."""
    saved = json.loads(json.dumps(to_dict(workdir.resolved(train_config()))))
    saved["ioit_from"] = saved.pop("init_from")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="ioit_from is '' in the run, None in the config"):
        workdir.same_run(train_config(), tmp_path, 4)


def test_files_of_something_else_are_not_written_over(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(
        FileError,
        match=r"log.jsonl exists, but .* holds no run .config.json.; name another --workdir",
    ):
        workdir.same_run(train_config(), tmp_path, None)
    with pytest.raises(FileError, match=r"log.jsonl line 1: is not a row of a run"):
        run_log.Log(tmp_path, train_config(), 0)
    assert (tmp_path / "log.jsonl").read_text() == '{"mine": 1}\n'


def test_what_does_not_change_the_updates_may_change(tmp_path):
    """How a step is computed, what is reported, evaluated and kept."""
    config = train_config()
    workdir.save_config(config, tmp_path)
    other = changed(
        config,
        eval__source="meta.json",
        eval__every=2,
        checkpoint__every=7,
        checkpoint__keep=9,
        logging__tensorboard=True,
        data__workers=3,
        micro_batches=2,
        remat_vision="full",
    )
    assert workdir.same_run(other, tmp_path, 4) == other
    for kind in ("mpo", "vico", "router"):
        workdir.save_config(changed(config, loss__kind=kind), tmp_path)
        with pytest.raises(ConfigError, match="micro_batches is 1 in the run, 2 in the config"):
            workdir.same_run(changed(config, loss__kind=kind, micro_batches=2), tmp_path, 4)


def test_a_run_is_lengthened_where_its_schedule_allows_it(tmp_path, capsys):
    """wsd does not look at the number of steps until it decays; cosine does from the first on."""
    config = changed(train_config(), optimizer__schedule="wsd")
    workdir.save_config(config, tmp_path)
    longer = changed(config, steps=60)
    assert workdir.same_run(longer, tmp_path, 20) == longer
    assert capsys.readouterr().out == (
        f"{tmp_path} is resumed with another schedule: steps is 30 in the run, 60 in the config\n"
    )
    assert workdir.same_run(longer, tmp_path, 30) == longer
    out = capsys.readouterr().out
    assert "its learning rate had decayed from step 26 on, and rises again" in out
    with pytest.raises(ConfigError, match="steps is 30 .* step 30 is done already"):
        workdir.same_run(changed(config, steps=10), tmp_path, 30)
    with pytest.raises(ConfigError, match="another configuration .*seed is 0 in the run"):
        workdir.same_run(changed(longer, seed=3), tmp_path, 30)


@pytest.mark.parametrize("change, message", [
    ({"steps": 60}, "steps is 30 in the run, 60 in the config"),
    ({"optimizer__warmup_steps": 5}, "optimizer.warmup_steps is 2 in the run, 5 in the config"),
    ({"optimizer__warmup_fraction": 0.5}, "optimizer.warmup_steps is 2 in the run, 15 in the config"),
    ({"optimizer__final_lr_fraction": 0.1}, "optimizer.final_lr_fraction is 0.0 in the run, 0.1 in"),
    ({"optimizer__schedule": "wsd"}, "optimizer.schedule is 'cosine' in the run, 'wsd' in the config"),
])  # fmt: skip
def test_another_cosine_schedule_is_refused(tmp_path, change, message):
    config = train_config()
    workdir.save_config(config, tmp_path)
    with pytest.raises(
        ConfigError, match=f"has another learning rate schedule: {message}"
    ) as error:
        workdir.same_run(changed(config, **change), tmp_path, 4)
    assert "\n" not in str(error.value)


def test_the_end_of_wsd_may_change_until_it_decays(tmp_path):
    config = changed(train_config(), optimizer__schedule="wsd")
    workdir.save_config(config, tmp_path)
    other = changed(config, optimizer__decay_fraction=0.3, optimizer__final_lr_fraction=0.1)
    assert workdir.same_run(other, tmp_path, 10) == other
    with pytest.raises(ConfigError, match="the learning rate of step 23, which is done, would"):
        workdir.same_run(other, tmp_path, 28)
    for change in ({}, {"steps": 60}):
        with pytest.raises(ConfigError, match="the learning rate of step 2, which is done, would"):
            workdir.same_run(changed(config, optimizer__warmup_steps=4, **change), tmp_path, 10)


def test_a_warm_up_fraction_is_of_the_steps_that_a_run_began_with(tmp_path):
    config = changed(train_config(), optimizer__schedule="wsd", optimizer__warmup_fraction=0.1)
    begun = workdir.same_run(config, tmp_path, None)
    assert (begun.optimizer.warmup_steps, begun.optimizer.warmup_fraction) == (3, 0.0)
    workdir.save_config(begun, tmp_path)
    assert workdir.same_run(config, tmp_path, 4) == begun
    with pytest.raises(ConfigError, match="optimizer.warmup_steps is 3 in the run, 6 in"):
        workdir.same_run(changed(config, optimizer__warmup_fraction=0.2), tmp_path, 4)

    # Lengthened once and again: the fraction still counts 30 steps, and no other fraction does.
    step = tmp_path / "checkpoints" / "4"
    step.mkdir(parents=True)
    (step / "training.json").write_text(json.dumps({"step": 4, "past": {"first_length": 30}}))
    for steps in (300, 600):
        longer = workdir.same_run(changed(config, steps=steps), tmp_path, 4)
        assert longer.optimizer.warmup_steps == 3
        workdir.save_config(longer, tmp_path)
    with pytest.raises(ConfigError, match="optimizer.warmup_steps is 3 in the run, 6 in"):
        workdir.same_run(changed(config, steps=600, optimizer__warmup_fraction=0.2), tmp_path, 4)


# --- the end -------------------------------------------------------------------------------------


def test_a_finished_run_says_so(tmp_path):
    config = changed(train_config(), eval__source="meta.json")
    for step in (4, 30):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    past = {"best": 1.23456, "best_step": 4, "seconds": 389.4}
    (tmp_path / "checkpoints" / "30" / "training.json").write_text(
        json.dumps({"step": 30, "past": past})
    )
    assert is_finished(config, 30) and not is_finished(config, 29)
    lines = farewell(config, tmp_path).splitlines()
    assert (
        lines[0]
        == f"{tmp_path} is finished: step 30 of 30, trained for 6m29s; the lowest eval loss, 1.235, is that of step 4"
    )
    assert lines[1] == f"ask it:    python infer.py --checkpoint {tmp_path}/checkpoints/4"
    assert lines[2] == f"export it: python -m convert {tmp_path}/checkpoints/4 DIRECTORY --to hf"
    assert (
        farewell(train_config(), tmp_path).splitlines()[0]
        == f"{tmp_path} is finished: step 30 of 30, trained for 6m29s"
    )


# --- signals -------------------------------------------------------------------------------------


def test_the_saved_configuration_is_all_of_it(tmp_path):
    workdir.save_config(train_config(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        json.dumps(to_dict(train_config()))
    )


def test_a_model_is_no_workdir(tmp_path):
    """And nothing is left in it, such as a lock."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    with (
        pytest.raises(FileError, match="holds a model, not a training run"),
        workdir.held(tmp_path),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
