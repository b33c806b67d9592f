"""examples/flash: its sheets, its recipe, and that its table is of its numbers."""

import json
import pathlib

import numpy as np
import pytest

from configs import flash as recipe
from examples.flash import data, run
from internvl3_jax.data.media.tiles import cut_tiles
from internvl3_jax.sizes import SIZES
from internvl3_jax.training.checks import validate
from internvl3_jax.training.optimizer import split_params
from tests.support.tiny_checkpoint import random_params

RESULTS = pathlib.Path(run.__file__).parent / "results"


def test_most_tiles_of_a_sheet_are_blank():
    processor = recipe.get_config().processor
    blank = []
    for question in data.held_out(40):
        tiles = cut_tiles(question.images[0], processor, 6)
        assert len(tiles) == 7  # with the thumbnail
        found = data.is_blank(tiles)
        assert not found[-1] and found[:-1].any() and not found[:-1].all()
        blank.append(found[:-1].mean())
    assert 0.5 < np.mean(blank) < 0.85


@pytest.mark.parametrize("stage", ["vico", "router"])
def test_the_recipe_trains_what_has_a_gradient(stage):
    config = recipe.get_config(stage)
    validate(config)
    trained, _ = split_params(random_params(config.model), config.optimizer.freeze)
    parts = set(trained) - {"flash"} | {f"flash/{name}" for name in trained["flash"]}
    expected = {"projector", "language", "flash/projector"}
    assert parts == (expected if stage == "vico" else {"flash/pooling", "flash/gating"})
    if stage == "router":
        assert set(trained["flash"]["pooling"]) == {"query", "attn1", "attn2", "norm1", "norm2"}
    assert config.model.vision == SIZES["tiny"].vision
    with pytest.raises(ValueError, match="has the stages vico and router, not 'both'"):
        recipe.get_config("both")


def test_the_table_is_of_the_results():
    results = json.loads((RESULTS / "results.json").read_text())
    assert (RESULTS / "results.md").read_text() == run.as_text(results["tests"])
    assert {len(runs) for runs in results["tests"].values()} == {3}
