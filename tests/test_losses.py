"""The chunked loss against the plain one: values, gradients, what is computed at all, and what
moves between devices.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from internvl3_jax.training.losses import chunked_cross_entropy, cross_entropy

ROWS, LENGTH, WIDTH, VOCAB, PADDED = 8, 24, 12, 37, 48
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def inputs(share=0.4):
    """(hidden, kernel, targets, weights); about `share` of the tokens have a weight, not as many in
    each row.
    """
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    kernel = rng.normal(size=(WIDTH, PADDED)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    weighted = rng.random((ROWS, LENGTH)) < share * np.linspace(0.3, 1.7, ROWS)[:, None]
    return (
        hidden,
        kernel,
        targets,
        (weighted * (0.1 + rng.random((ROWS, LENGTH)))).astype(np.float32),
    )


def plain(hidden, kernel, targets, weights):
    logits = jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return cross_entropy(
        jnp.where((jnp.arange(PADDED) < VOCAB)[None, None], logits, -1e30), targets, weights
    )[0]


def chunked(hidden, kernel, targets, weights, chunk=7, groups=None):
    return chunked_cross_entropy(hidden, kernel, targets, weights, VOCAB, chunk, groups)[0]


def gradients(function, *args):
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(*args)


def assert_close(found, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or TOLERANCE)), found, expected
    )


@pytest.mark.parametrize(
    ("chunk", "groups"), [(1, 1), (7, 1), (7, 4), (24, 8), (10_000, 2), (64, 3)]
)
@pytest.mark.parametrize("share", [0.4, 10.0], ids=["some trained", "all trained"])
def test_values_and_gradients(chunk, groups, share):
    """Whatever the chunks; three groups of eight rows become one."""
    args = inputs(share)
    expected = gradients(plain, *args)
    assert_close(gradients(functools.partial(chunked, chunk=chunk, groups=groups), *args), expected)
    assert not np.asarray(expected[1][1])[:, VOCAB:].any()


def test_the_losses_of_tokens():
    """They carry no gradient, and their weighted sum is the total."""
    hidden, kernel, targets, weights = inputs()
    total, losses = jax.jit(lambda *args: chunked_cross_entropy(*args, VOCAB, 7))(
        hidden, kernel, targets, weights
    )
    logits = np.einsum("btd,dv->btv", hidden, kernel)[..., :VOCAB].astype(np.float64)
    expected = (
        np.log(np.exp(logits).sum(axis=-1))
        - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    )
    np.testing.assert_allclose(losses, np.where(weights > 0, expected, 0), **TOLERANCE)
    np.testing.assert_allclose(total, (losses * weights).sum(), **TOLERANCE)
    silent = gradients(
        lambda *args: chunked_cross_entropy(*args, VOCAB, 7)[1].sum(),
        hidden,
        kernel,
        targets,
        weights,
    )[1]
    assert not any(np.asarray(leaf).any() for leaf in silent)


def test_nothing_trained():
    hidden, kernel, targets, weights = inputs()
    total, found = gradients(chunked, hidden, kernel, targets, np.zeros_like(weights))
    assert total == 0 and not any(np.asarray(leaf).any() for leaf in found)


def test_tied_embeddings():
    """The gradient reaches the embedding from both of its ends."""
    _, kernel, targets, weights = inputs()
    tokens = np.random.default_rng(1).integers(0, VOCAB, (ROWS, LENGTH))

    def loss(function, table, scale):
        return function(table[tokens] * scale, table.T, targets, weights)

    args = (kernel.T.copy(), np.float32(0.5))
    assert_close(
        *(gradients(functools.partial(loss, function), *args) for function in (chunked, plain))
    )


def test_bfloat16_hidden_states():
    """Logits and sums stay float32; the gradients round to bfloat16 once, where a product takes
    them.
    """
    hidden, kernel, targets, weights = inputs()
    args = (jnp.asarray(hidden, jnp.bfloat16), kernel, targets, weights)
    loss, (by_hidden, by_kernel) = gradients(chunked, *args)
    expected = gradients(plain, *args)
    assert (loss.dtype, by_hidden.dtype, by_kernel.dtype) == (
        jnp.float32,
        jnp.bfloat16,
        jnp.float32,
    )
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    for found, wanted in zip((by_hidden, by_kernel), expected[1], strict=True):
        found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
        np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=1e-2 * np.abs(wanted).max())


def test_only_chunks_with_trained_tokens_are_computed(monkeypatch):
    """As many as the group with most of them needs."""
    from internvl3_jax.training import losses

    seen, compute = [], losses._chunk

    def counted(x, *args):
        jax.debug.callback(lambda: seen.append(1))
        return compute(x, *args)

    monkeypatch.setattr(losses, "_chunk", counted)
    hidden, kernel, targets, weights = inputs()
    for groups in (1, 8):
        seen.clear()
        gradients(
            functools.partial(chunked, chunk=3, groups=groups), hidden, kernel, targets, weights
        )
        jax.effects_barrier()
        most = (weights.reshape(groups, -1) > 0).sum(axis=1).max()
        assert len(seen) == -(-most // 3) < ROWS * LENGTH // groups // 3


def test_a_weight_may_be_negative():
    hidden, kernel, targets, weights = inputs()
    one, other = (
        gradients(chunked, hidden, kernel, targets, sign * weights)
        for sign in (np.float32(1), np.float32(-1))
    )
    assert_close(other, jax.tree.map(jnp.negative, one))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0], ids=["token", "square", "sample"])
def test_averages_over_samples(power):
    """With weights x ** -p the loss is the mean of the samples' mean losses, weighted by x ** (1 -
    p) of their x trained tokens.
    """
    hidden, kernel, targets, weights = inputs()
    trained = weights > 0  # each row is a sample here
    count = trained.sum(axis=1, keepdims=True)
    weights = (trained * count.astype(np.float32) ** -power).astype(np.float32)
    total, losses = chunked_cross_entropy(hidden, kernel, targets, weights, VOCAB, 7)
    means = np.asarray(losses).sum(axis=1) / count[:, 0]
    expected = np.average(means, weights=count[:, 0] ** (1 - power))
    np.testing.assert_allclose(total / weights.sum(), expected, rtol=1e-5)


# --- on eight devices ----------------------------------------------------------------------------

MESHES = [((8,), ("data",)), ((2, 4), ("data", "fsdp")), ((2, 2, 2), ("data", "fsdp", "tensor"))]


@pytest.mark.parametrize(("shape", "names"), MESHES, ids=lambda value: "x".join(map(str, value)))
def test_hidden_states_stay_on_their_device(shape, names):
    """The same numbers as on one device. Nothing is gathered but a sharded kernel, once and outside
    of the loop over chunks.
    """
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    rows = NamedSharding(mesh, jax.P(tuple(name for name in names if name != "tensor")))
    matrix = NamedSharding(
        mesh, jax.P(*(name if name in names else None for name in ("fsdp", "tensor")))
    )
    args = [
        jax.device_put(x, at) for x, at in zip(inputs(), (rows, matrix, rows, rows), strict=True)
    ]
    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.value_and_grad(chunked, argnums=(0, 1)), out_shardings=(None, (rows, matrix))
        )
        compiled = step.lower(*args).compile()
        found = compiled(*args)
    assert_close(found, gradients(plain, *inputs()))
    moves = collectives(compiled.as_text())
    assert set(moves) <= {"all-reduce", "all-gather", "reduce-scatter"}
    gathered = moves.get("all-gather", [])
    split = PADDED // (2 if "tensor" in names else 1)
    assert gathered == [f"f32[{WIDTH},{split}]"] * ("fsdp" in names)


def test_groups_do_without_a_mesh_in_context():
    """Where the rows are sharded and no mesh is set, `groups` says so; without it full rows are
    communicated, as the count says.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, jax.P("data")), NamedSharding(mesh, jax.P())
    args = [
        jax.device_put(x, at)
        for x, at in zip(inputs(), (rows, everywhere, rows, rows), strict=True)
    ]

    def moves(groups):
        step = jax.value_and_grad(functools.partial(chunked, groups=groups), argnums=(0, 1))
        return collectives(jax.jit(step).lower(*args).compile().as_text())

    assert set(moves(8)) == {"all-reduce"}
    assert "all-gather" in moves(1)


def collectives(text):
    """Shape of the result of every collective of a compiled program, by kind."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = {}
    for shape, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        found.setdefault(kind, []).append(re.sub(r"\{[^}]*\}", "", shape))
    return found


def test_a_frozen_head_costs_no_gradient():
    """Where the kernel is not trained, the compiler drops the product for its gradient and the sum
    that would hold it.
    """
    shapes = (
        ((2, 32, 64), "float32"),
        ((64, 1024), "float32"),
        ((2, 32), "int32"),
        ((2, 32), "float32"),
    )
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def loss(*arguments):
        return chunked_cross_entropy(*arguments, 1000, chunk=16)[0]

    both, frozen = (
        jax.jit(jax.grad(loss, which)).lower(*arguments).compile() for which in ((0, 1), 0)
    )
    assert frozen.cost_analysis()["flops"] < 0.75 * both.cost_analysis()["flops"], (
        "two products with the kernel in place of three"
    )
    carried = [line for line in frozen.as_text().splitlines() if " while(" in line]
    assert len(carried) == 1 and carried[0].split(" while(")[0].count("64,1024]") == 1, (
        "the loop carries the kernel and no gradient of it"
    )
