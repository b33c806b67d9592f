"""transformers' InternVL as an engine, for a checkpoint in its layout.

It gets the pack's ids and tiles: what is compared is its tokenizer, and the model from the tower to
the greedy answer.
"""

import json
import pathlib

import numpy as np

from internvl3_jax.parity.folder import Case, PackedModel, PackError

UNITS = 256


class TransformersEngine:
    """Runs a checkpoint, in eager attention, which is the plain formula.

    Args:
      path: the checkpoint's directory.
      model: of the pack.
      dtype: name of the dtype of the computation.

    Raises:
      PackError: PyTorch or transformers is missing, or the checkpoint has another layout.
    """

    def __init__(self, path: str | pathlib.Path, model: PackedModel, dtype: str = "float32"):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise PackError(
                f"{error}; --engine transformers needs: pip install torch transformers"
            ) from error
        _check_layout(pathlib.Path(path))
        self.torch, self.stop_ids = torch, model.stop_ids
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        transformers.utils.logging.disable_progress_bar()
        loaded = transformers.InternVLForConditionalGeneration.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="eager"
        )
        self.model = loaded.eval().to(self.device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        file = pathlib.Path(path) / "preprocessor_config.json"
        values = json.loads(file.read_text()) if file.is_file() else {}
        self.mean = np.float32(values.get("image_mean", model.normalization["mean"]))
        self.std = np.float32(values.get("image_std", model.normalization["std"]))

    def run(self, root: pathlib.Path, case: Case) -> dict:
        """Returns the stages up to an error of the model, which is in "error"."""
        with self.torch.no_grad():
            stages = {}
            try:
                for name, value in self._stages(case):
                    stages[name] = value
            except (ValueError, RuntimeError, IndexError) as error:
                stages["error"] = str(error)
            return stages

    def _stages(self, case: Case):
        """Yields (stage, value)."""
        golden, torch = case.stages, self.torch
        ids = self.tokenizer(golden["rendered"], add_special_tokens=False)["input_ids"]
        yield "token_ids", np.asarray(ids, np.int64)
        # 1) Tower and projector.
        inputs = {}
        if "tiles" in golden:
            pixels = (golden["tiles"].astype(np.float32) / 255 - self.mean) / self.std
            pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device, self.model.dtype)
            tower = self.model.model.vision_tower(pixels).last_hidden_state[:, 1:]
            yield "tower", _array(tower)
            features = self.model.get_image_features(pixel_values=pixels)
            features = getattr(features, "pooler_output", features)
            yield "projector", _array(features).reshape(len(pixels), -1, features.shape[-1])
            inputs["pixel_values"] = pixels
        # 2) The decoder, and the greedy answer without a cache.
        ids = torch.from_numpy(golden["token_ids"])[None].to(self.device)
        positions = torch.from_numpy(golden["positions"])[None].to(self.device) / UNITS
        answer = []
        for step in range(case.request.max_new_tokens):
            out = self.model(
                input_ids=ids, position_ids=positions, output_hidden_states=not step, **inputs
            )
            if not step:
                for name, index in (("embeddings", 0), ("hidden_first", 1), ("hidden_last", -1)):
                    yield name, _array(out.hidden_states[index][0])
                yield "logits", _array(out.logits[0, -1])
            answer.append(int(out.logits[0, -1].argmax()))
            if answer[-1] in self.stop_ids:
                break
            ids = torch.cat([ids, ids.new_tensor([[answer[-1]]])], dim=1)
            positions = torch.cat([positions, positions[:, -1:].ceil() + 1], dim=1)
        yield "answer_ids", np.asarray(answer, np.int64)


def _check_layout(path: pathlib.Path) -> None:
    """Raises PackError for a local checkpoint that transformers would fill with random weights."""
    file = path / "config.json"
    kind = json.loads(file.read_text()).get("model_type") if file.is_file() else "internvl"
    if kind != "internvl":
        raise PackError(
            f"{path} has the model type {kind!r}, whose model is not part of transformers; convert "
            "it: python -m convert DIR HF_DIR --to hf"
        )


def _array(tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
