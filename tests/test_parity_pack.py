"""The parity pack: it passes on this package and on transformers, and names each known fault.

The faults here are put into another engine (transformers, Pillow, plain text), not into the copy of
ours with which the pack computes what they would give.
"""

import dataclasses
import http.server
import json
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import internvl3_jax
from internvl3_jax.checkpoints.storage import by_path
from internvl3_jax.parity import tiny_models
from internvl3_jax.parity.__main__ import main
from internvl3_jax.parity.check import check_model, compare_case
from internvl3_jax.parity.compare import STAGES, compare, derived
from internvl3_jax.parity.folder import PackError, read_case, read_manifest
from internvl3_jax.parity.pack import write_pack
from internvl3_jax.parity.tiny_config import FAMILIES
from internvl3_jax.parity.transformers_engine import TransformersEngine

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "support" / "parity_engine.py"
NAME = "internvl3_5"  # Qwen3: every fault can occur


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    root = tmp_path_factory.mktemp("parity") / "pack"
    write_pack(root, families=(NAME,))
    return root


@pytest.fixture
def peer(pack):
    (model,) = read_manifest(pack)
    return TransformersEngine(pack / model.checkpoints["hf"], model)


def golden(pack, case):
    return read_case(pack / NAME, case)


def causes(case, **stages):
    """Returns the stage and the causes that are named for an engine with other stages."""
    result = compare_case(case, case.stages | stages, "float32")
    return result.difference.stage, result.causes


# --- what passes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["internvl", "hf"])
def test_this_package_passes_in_both_layouts(pack, layout, capsys):
    assert main(["check", str(pack), "--engine", "jax", "--layout", layout]) == 0
    printed = capsys.readouterr().out
    assert f"image    equal: {', '.join(STAGES)}" in printed
    assert "6 equal, 0 not, 0 left out" in printed


def test_transformers_passes(pack, peer):
    (model,) = read_manifest(pack)
    results = check_model(pack, model, peer)
    assert [result.passed for result in results] == [True] * 6
    given = "token_ids prompt_tokens tower projector embeddings hidden_first hidden_last logits"
    assert results[1].compared == [*given.split(), "logprobs", "answer_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_both_layouts_of_a_tiny_model_hold_the_same_parameters(name, tmp_path):
    paths = tiny_models.write(tmp_path / name, name, seed=3)
    original, transformers = (internvl3_jax.load(paths[layout]) for layout in ("internvl", "hf"))
    assert original.processor.delta == (64 if name == "v2pe" else 256)
    one, other = by_path(original.params), by_path(transformers.params)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert np.array_equal(leaf, other[path]), path


def test_a_program_passes_with_numpy_alone(pack, tmp_path):
    """Neither jax nor any other library may be imported by the runner."""
    blocked = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        top = name.split('.')[0]\n"
        "        if top not in sys.stdlib_module_names | {'numpy', 'internvl3_jax'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from internvl3_jax.parity.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    run = [sys.executable, "-c", blocked, "check", str(pack), "--engine", "command", "--command"]
    program = f"{sys.executable} {PROGRAM} {pack / NAME}"
    done = subprocess.run([*run, program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "6 equal, 0 not" in done.stdout
    done = subprocess.run(
        [*run, f"{program} frame_label"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "video    DIFFERS first at rendered" in done.stdout
    assert "Frame1 instead of Frame-1" in done.stdout and "5 equal, 1 not" in done.stdout


# --- known faults ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "change", "cause"),
    [
        ("text", lambda text: text.replace("<|im_end|>\n", "<|im_end|>"), "no_newline"),
        ("text", lambda text: text.removesuffix("<|im_start|>assistant\n"), "no_generation_prompt"),
        ("text", lambda text: re.sub(r"^<\|im_start\|>system.*?<\|im_end\|>\n", "", text, flags=re.S), "no_system"),
        ("text", lambda text: re.sub(r"(?<=system\n).*?(?=<\|im_end\|>)", "", text, count=1, flags=re.S), "empty_system"),
        ("video", lambda text: text.replace("Frame-", "Frame"), "frame_label"),
        ("images", lambda text: re.sub("Image-[12]: ", "", text), "image_label"),
        ("image", lambda text: text.replace("<IMG_CONTEXT>", "<think>"), "image_id_in_prompt"),
    ],
)  # fmt: skip
def test_faults_of_the_prompt_are_named_by_text_ids_or_their_number(
    pack, peer, case, change, cause
):
    case = golden(pack, case)
    text = change(case.stages["rendered"])
    assert causes(case, rendered=text) == ("rendered", [cause])
    ids = np.asarray(peer.tokenizer(text, add_special_tokens=False)["input_ids"])
    found = {"token_ids": ids}
    assert compare_case(case, found, "float32").causes == [cause]
    if len(ids) != len(case.stages["token_ids"]):
        counted = compare_case(case, {"prompt_tokens": np.asarray(len(ids))}, "float32")
        assert counted.difference.stage == "prompt_tokens" and cause in counted.causes


def test_a_tie_broken_on_area_is_named(pack):
    case = golden(pack, "square")
    with Image.open(pack / case.request.images[0]) as image:
        large = image.resize((48, 48), Image.Resampling.BICUBIC)
        boxes = [(16 * x, 16 * y, 16 * x + 16, 16 * y + 16) for y in range(3) for x in range(3)]
        tiles = np.stack([np.asarray(large.crop(box)) for box in boxes] + [np.asarray(image)])
    assert compare_case(case, {"tiles": tiles}, "float32").causes == ["tie_on_area"]
    assert causes(case, tile_counts=np.asarray([10])) == ("tile_counts", ["tie_on_area"])


def test_faults_of_tiles_are_named(pack):
    case = golden(pack, "image")
    tiles = case.stages["tiles"]
    assert causes(case, tiles=tiles[[2, 0, 1]]) == ("tiles", ["thumbnail_first"])
    assert causes(case, tiles=tiles[..., ::-1]) == ("tiles", ["bgr"])
    assert compare_case(case, {"tiles": tiles[:2]}, "float32").causes == ["no_thumbnail"]
    positions = np.arange(len(case.stages["positions"])) * 256
    assert causes(golden(pack, "v2pe"), positions=positions) == ("positions", ["v2pe_ignored"])


def drop_qk_norm(engine):
    for layer in engine.model.model.language_model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()


def tie_head(engine):
    engine.model.lm_head.weight = engine.model.model.language_model.embed_tokens.weight


def half_mean(engine):
    engine.mean = engine.std = np.float32([0.5, 0.5, 0.5])


def small_base(engine):
    config = engine.model.config.text_config
    config.rope_parameters = config.rope_parameters | {"rope_theta": 1e4}
    language = engine.model.model.language_model
    language.rotary_emb = type(language.rotary_emb)(config)


@pytest.mark.parametrize(
    ("spoil", "stage", "cause"),
    [
        (drop_qk_norm, "hidden_first", "no_qk_norm"),
        (tie_head, "logits", "tied_head"),
        (half_mean, "tower", "mean_std"),
        (small_base, "hidden_first", "rope_theta"),
    ],
)
def test_faults_of_the_model_are_named(pack, peer, spoil, stage, cause):
    spoil(peer)
    case = golden(pack, "image")
    result = compare_case(case, peer.run(pack, case), "float32")
    assert (result.difference.stage, result.causes) == (stage, [cause])
    assert result.difference.error > 0.01


def test_the_default_image_id_stops_transformers_and_is_named(pack, peer):
    peer.model.config.image_token_id -= 4  # 151667 for 151671
    case = golden(pack, "image")
    found = peer.run(pack, case)
    result = compare_case(case, found, "float32")
    assert result.difference is None and not result.passed
    assert result.text.startswith("after projector: ") and "image token id" in result.text
    # An engine that does not stop puts the features nowhere.
    table = peer.model.model.language_model.embed_tokens.weight.detach().numpy()
    embeddings = table[case.stages["token_ids"]]
    assert causes(case, embeddings=embeddings) == ("embeddings", ["image_id_in_model"])


def test_precision_and_end_ids_are_named(pack, peer):
    case = golden(pack, "image")
    peer.model = peer.model.to(torch.bfloat16)
    found = peer.run(pack, case)
    result = compare_case(case, found, "float32")
    assert result.difference.stage == "tower" and "precision: bfloat16" in result.text
    assert compare_case(case, found, "bfloat16").passed
    longer = np.append(case.stages["answer_ids"], 7)
    result = compare_case(case, case.stages | {"answer_ids": longer}, "float32")
    assert result.text.startswith("end ids")


def test_what_is_no_known_fault_is_not_named(pack):
    case = golden(pack, "image")
    logits = case.stages["logits"] + np.float32(1)
    result = compare_case(case, case.stages | {"logits": logits * 2}, "float32")
    assert (result.difference.stage, result.causes) == ("logits", [])
    assert "none of the known faults" in result.text
    broken = np.full_like(logits, np.nan)
    assert compare("logits", broken, logits, 1e-3).error == np.inf


# --- a server -------------------------------------------------------------------------------------


@pytest.fixture
def server(pack):
    """A server that answers from the goldens. `faults`: those of its prompt, by case."""
    faults = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            self.reply({"data": [{"id": "tiny"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][0]["content"][-1]["text"]
            for name in ("text", "image", "square", "images"):
                case = golden(pack, name)
                if case.request.question == question:
                    break
            stages = derived(case.stages | case.faults.get(faults.get(name), {}), case.top)
            top = [{"token": str(id), "logprob": value} for id, _, value in case.top]
            self.reply(
                {
                    "choices": [
                        {
                            "message": {"content": stages["answer"]},
                            "logprobs": {"content": [{"top_logprobs": top}]},
                        }
                    ],
                    "usage": {"prompt_tokens": len(stages["token_ids"])},
                }
            )

        def reply(self, content):
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", faults
    httpd.shutdown()
    httpd.server_close()


def test_a_server_is_compared_by_answers_counts_and_log_probabilities(pack, server, capsys):
    url, faults = server
    command = ["check", str(pack), "--engine", "http", "--url", url]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "image    equal: prompt_tokens, logprobs, answer" in printed
    assert "4 equal, 0 not, 2 left out" in printed
    faults["square"] = "tie_on_area"
    assert main([*command, "--case", "square"]) == 1
    printed = capsys.readouterr().out
    assert "DIFFERS first at prompt_tokens" in printed and "[tie_on_area]" in printed


# --- errors ---------------------------------------------------------------------------------------


def test_errors_say_what_to_do(pack, tmp_path, capsys):
    def error(*arguments):
        assert main(list(map(str, arguments))) == 1
        return capsys.readouterr().err

    check = ("check", pack, "--engine")
    assert "manifest.json is missing; write a pack with" in error(
        "check", tmp_path, "--engine", "jax"
    )
    assert "choose a new folder" in error("pack", "--output", pack)
    assert "has no model 'x'; it has internvl3_5" in error(*check, "jax", "--model", "x")
    assert "cases: text, image" in error(
        *check, "command", "--command", f"{sys.executable} {PROGRAM} {pack / NAME}", "--case", "x"
    )
    assert "cannot start" in error(*check, "command", "--command", "no_such_program")
    assert "ended at case 'text'" in error(*check, "command", "--command", "true")
    assert "/v1" in error(*check, "http", "--url", "http://127.0.0.1:9/v1")
    copy = shutil.copytree(pack, tmp_path / "copy")
    (copy / NAME / "text.json").write_text("{}")
    with pytest.raises(PackError, match=r"text.json is not what the pack was written with"):
        read_manifest(copy)


def test_a_pack_of_a_checkpoint_holds_no_weights(pack, tmp_path, capsys, monkeypatch):
    from internvl3_jax.parity import pack as writer

    only = {"text": read_case(pack / NAME, "text").request}
    monkeypatch.setattr(writer, "requests", lambda *arguments: dict(only))
    root, source = tmp_path / "goldens", str(pack / NAME / "internvl")
    assert main(["pack", "--output", str(root), "--checkpoint", source]) == 0
    assert not list(root.rglob("*.safetensors"))
    case = read_case(root / "checkpoint", "text")
    assert dataclasses.replace(case.request) == only["text"]
    capsys.readouterr()
    assert main(["check", str(root), "--engine", "jax"]) == 1
    assert "holds no weights; name them with --checkpoint" in capsys.readouterr().err
    peers = ["--engine", "transformers", "--checkpoint", str(pack / NAME / "hf")]
    assert main(["check", str(root), *peers]) == 0
