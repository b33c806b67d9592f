"""Names a tensor to damage, and checks that a conversion is refused and leaves nothing."""

import pytest

from internvl3_jax.checkpoints.hf.assemble import ConversionError
from tests.support.released import convert

KEY = "language_model.model.layers.1.mlp.up_proj.weight"


def check_refused(released, match, tmp_path):
    with pytest.raises((ConversionError, ValueError), match=match):
        convert(released, tmp_path / "ours")
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith("ours")]
