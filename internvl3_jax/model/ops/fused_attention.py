"""Attention of one new token of each row to the cache, on Hopper GPUs, in one kernel.

Slots are divided into chunks, so that all of the device works on a few rows. A block computes the
softmax over one chunk for the heads that share a key head, and writes it with its logsumexp (base
2); the next kernel (`attended_product`) joins the chunks. Slots after the new token are not read.

The new token is a chunk of its own. Its block also writes the keys and values into the cache.

B rows, P parts of the product, N query heads and K key heads of width H, S slots, C chunks.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from internvl3_jax.model.ops.fused_product import ROWS, norm_factor

TILE = 64  # slots that are multiplied at once
_QUERIES = 64  # rows of the products; the queries of a key head are at most the first 8 of them
_BYTES_IN_FLIGHT = 96 * 1024  # of keys and values that a block waits for at once
_MASKED = -1e30  # finite, so that no difference of two is NaN


def halves_layout(width: int) -> Any:
    """Returns the layout of [8, width]: two rows in each warp, columns over its lanes."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((ROWS, width), (2, width), (width // 32,))),
        warp_dims=(-5,),
        lane_dims=(-2,),
        vector_dim=-1,
    )


@functools.partial(jax.jit, static_argnames=("width", "epsilon", "chunk", "interpret"))
def attend(
    partials: Float32[Array, "P 8 NKKH"],
    squares: Float32[Array, "Q 8"],
    bias: BFloat16[Array, " NKKH"],
    cos: Float32[Array, "B half"],
    sin: Float32[Array, "B half"],
    slots: Int32[Array, " B"],
    k_cache: BFloat16[Array, "B K S H"],
    v_cache: BFloat16[Array, "B K S H"],
    width: int,
    epsilon: float,
    chunk: int,
    interpret=None,
) -> tuple[
    Float32[Array, "B C N H"],
    Float32[Array, "B C N half"],
    BFloat16[Array, "B K S H"],
    BFloat16[Array, "B K S H"],
]:
    """Returns each chunk's attention, its logsumexp in every column, and the new caches.

    A chunk without slots of the row has the logsumexp -1e30, and its attention is undefined.

    Args:
      partials: What `norm_product` returns of the kernel [q, k, v].
      squares: The same.
      slots: Of the new tokens.
      width: Of the residual stream.
      chunk: Slots of a chunk, a multiple of 64.
      interpret: plgpu.InterpretGPUParams to run on a CPU.
    """
    rows, kv_heads, capacity, head_width = k_cache.shape
    all_heads = bias.shape[0] // head_width
    heads = all_heads - 2 * kv_heads
    group, half, chunks = heads // kv_heads, head_width // 2, pl.cdiv(capacity, chunk)
    stages = min(chunk // TILE, _BYTES_IN_FLIGHT // (TILE * head_width * 4))
    scale = head_width**-0.5 * math.log2(math.e)  # exponents are of 2
    parts = partials.shape[0]
    low, high = pl.ds(0, half), pl.ds(half, half)
    pair = halves_layout(half)
    single = pair.reduce(0)

    def body(partials, squares, bias, cos, sin, slots, k_cache, v_cache, out, lse, *scratch):
        k_tiles, v_tiles, q_plain, q_tiled, p_tiled, out_smem, lse_smem, *barriers = scratch
        k_barriers, v_barriers = barriers
        row, head, part = (jax.lax.axis_index(name) for name in ("row", "head", "part"))
        slot, start = slots[row], part * chunk
        # The new token's chunk, the last one, has no tiles.
        tiles = jnp.clip((slot - start + TILE - 1) // TILE, 0, chunk // TILE)
        tiles = jnp.where(part == chunks, 0, tiles)

        def load(tile, stage):
            source = row, head, pl.ds(start + tile * TILE, TILE)
            plgpu.copy_gmem_to_smem(k_cache.at[source], k_tiles.at[stage], k_barriers.at[stage])
            plgpu.copy_gmem_to_smem(v_cache.at[source], v_tiles.at[stage], v_barriers.at[stage])

        # 1) Keys and values.
        for tile in range(stages):
            pl.when(tile < tiles)(functools.partial(load, tile, tile))

        # 2) Queries of the key head, and of those after them up to eight.
        factor = norm_factor(squares, row, width, epsilon)

        def projected(index, columns, layout):
            at = [partials.at[number, row, index, columns] for number in range(parts)]
            total = functools.reduce(
                jnp.add, [plgpu.load(y, layout=layout, optimized=False) for y in at]
            )
            added = plgpu.load(bias.at[index, columns], layout=layout, optimized=False)
            total = total * factor + added.astype(jnp.float32)
            return total.astype(jnp.bfloat16).astype(jnp.float32)

        def rotated(index, layout, cos, sin):
            first, second = (projected(index, columns, layout) for columns in (low, high))
            pairs = first * cos - second * sin, second * cos + first * sin
            return [y.astype(jnp.bfloat16) for y in pairs]

        def wide(x, axis=1):
            return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, (ROWS, half), (axis,)), pair)

        cosine, sine = (plgpu.load(y.at[row], layout=single, optimized=False) for y in (cos, sin))
        queries = rotated(pl.ds(head * group, ROWS), pair, wide(cosine), wide(sine))

        # 3) A chunk of the cache.
        @pl.when(tiles > 0)
        def _():
            for columns, query in zip((low, high), queries, strict=True):
                q_plain[pl.ds(0, ROWS), columns] = query
            q_tiled[...] = plgpu.load(q_plain, layout=plgpu.Layout.WGMMA, optimized=False)
            plgpu.commit_smem()

            def step(tile, carry):
                acc, largest, total = carry
                stage = jax.lax.rem(tile, stages)
                # Scores and their softmax.
                plgpu.barrier_wait(k_barriers.at[stage])
                scores = _product(q_tiled, k_tiles.at[stage].transpose((1, 0)))
                index = plgpu.broadcasted_iota(
                    jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA
                )
                is_earlier = index < slot - start - tile * TILE
                scores = jnp.where(is_earlier, scores * scale, _MASKED)
                new = jnp.maximum(largest, scores.max(axis=1))
                shrink = jnp.exp2(largest - new)
                weights = jnp.exp2(scores - jax.lax.broadcast_in_dim(new, scores.shape, (0,)))
                total = total * shrink + weights.sum(axis=1)
                # Values.
                p_tiled[...] = weights.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.barrier_wait(v_barriers.at[stage])
                acc = acc * jax.lax.broadcast_in_dim(shrink, acc.shape, (0,))
                acc += _product(p_tiled, v_tiles.at[stage])
                if stages < chunk // TILE:
                    pl.when(tile + stages < tiles)(lambda: load(tile + stages, stage))
                return acc, new, total

            def full(shape, value, layout):
                return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

            layout = plgpu.Layout.WGMMA
            carry = (
                full((_QUERIES, head_width), 0.0, layout),
                full((_QUERIES,), _MASKED, layout.reduce(1)),
                full((_QUERIES,), 0.0, layout.reduce(1)),
            )
            acc, largest, total = jax.lax.fori_loop(0, tiles, step, carry)
            out_smem[...] = acc / jax.lax.broadcast_in_dim(total, acc.shape, (0,))
            exponent = largest + jnp.log2(total)
            lse_smem[...] = plgpu.layout_cast(
                jax.lax.broadcast_in_dim(exponent, (_QUERIES, half), (0,)), layout
            )

        # 4) A chunk without tokens.
        @pl.when((tiles == 0) & (part < chunks))
        def _():
            nothing = jnp.full((ROWS, half), _MASKED, jnp.float32)
            lse_smem[pl.ds(0, ROWS)] = plgpu.layout_cast(nothing, pair)

        # 5) The new token.
        @pl.when(part == chunks)
        def _():
            keys = rotated(heads + head, single, cosine, sine)
            score = 0.0
            for columns, key, query in zip((low, high), keys, queries, strict=True):
                value = projected(heads + kv_heads + head, columns, single)
                k_cache[row, head, slot, columns] = key
                v_cache[row, head, slot, columns] = value.astype(jnp.bfloat16)
                key, query = key.astype(jnp.float32), query.astype(jnp.float32)
                score += (query * wide(key)).sum(axis=1)
                out_smem[pl.ds(0, ROWS), columns] = wide(value)
            lse_smem[pl.ds(0, ROWS)] = wide(score * scale, axis=0)

        # 6) The rows of this key head's queries.
        plgpu.commit_smem()
        own = pl.ds(head * group, group)
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, group)], out.at[row, part, own])
        plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, group)], lse.at[row, part, own])
        plgpu.wait_smem_to_gmem(0)

    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    tile = plgpu.SMEM((stages, TILE, head_width), jnp.bfloat16, transforms=transforms)
    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((rows, chunks + 1, heads, head_width), jnp.float32),
            jax.ShapeDtypeStruct((rows, chunks + 1, heads, half), jnp.float32),
        ],
        scratch_types=[
            tile,
            tile,
            plgpu.SMEM((_QUERIES, head_width), jnp.bfloat16),
            plgpu.SMEM((_QUERIES, head_width), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((_QUERIES, TILE), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((_QUERIES, head_width), jnp.float32),
            plgpu.SMEM((_QUERIES, half), jnp.float32),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        grid=(chunks + 1, kv_heads, rows),
        grid_names=("part", "head", "row"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="attend",
        interpret=interpret,
    )
    by_head = partials.reshape(parts, ROWS, all_heads, head_width)
    # References, so that the kernel writes into the caches themselves.
    k_ref, v_ref = jax.new_ref(k_cache), jax.new_ref(v_cache)
    out, lse = kernel(
        by_head, squares, bias.reshape(all_heads, head_width), cos, sin, slots, k_ref, v_ref
    )
    return out, lse, k_ref[...], v_ref[...]


def _product(left, right) -> jax.Array:
    """Returns left @ right of two references, in float32."""

    def run(total):
        plgpu.wgmma(total, left, right)
        return total[...]

    shape = left.shape[0], right.shape[1]
    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
