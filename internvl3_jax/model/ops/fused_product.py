"""Products of a few rows on Hopper GPUs, each in one kernel with what comes before it.

Decoding multiplies 1 to 8 rows with every weight. XLA takes about 21 kernels a layer for that, most
of which only start and end. Here a kernel prepares its input (sums, norm, activation, softmax) by
itself, in every block the part that the block multiplies:

    1) Start the copies of the weights, which depend on nothing.
    2) Prepare rows [8, window] and lay them out as the tensor cores take them.
    3) Multiply: weights are the left operand, and rows are the right one, of the least width, 8.
    4) Write the block's part of the sum over inputs. The kernel that reads the parts adds them.

RMSNorm's factor, one number for each row, is applied by the reader of a product: that needs the sum
of all squares, and so no block has to wait for others.

B rows, D inputs, F outputs, P parts of a product, N heads of width H, C chunks of a cache.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16

ROWS = 8  # of every product: the narrowest that the tensor cores take
TILE = 64  # inputs and outputs of a tile of weights; its rows are 128 bytes, as the swizzle takes
MULTIPROCESSORS = 132  # of an H100
SHARED_BYTES = 227 * 1024  # of a multiprocessor
# Of a result: it is written transposed, so one value at a time.
_RESULT = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))),
    warp_dims=(-8,),
    lane_dims=(-4, -3),
    vector_dim=-1,
)


@dataclasses.dataclass(frozen=True)
class Split:
    """Division of a product [B,D] @ [D,F] over blocks.

    Attributes:
      parts: Along D.
      width: Outputs of a block, a multiple of 64.
      unit: Inputs that are not divided between blocks, a multiple of 64.
      step: The inputs that a block prepares are a multiple of it.
    """

    parts: int
    width: int = TILE
    unit: int = TILE
    step: int = 128

    def most(self, depth: int) -> int:
        """Returns the tiles that a block multiplies at most."""
        return pl.cdiv(depth // self.unit, self.parts) * (self.unit // TILE)

    def window(self, depth: int) -> int:
        """Returns how many inputs a block prepares: those that it multiplies, and a few more."""
        return min(pl.cdiv(self.most(depth) * TILE, self.step) * self.step, depth)

    def blocks(self, outputs: int) -> int:
        """Returns the number of blocks."""
        return self.parts * (outputs // self.width)

    def stages(self, depth: int, outputs: int) -> int:
        """Returns the tiles of weights that a block waits for at once.

        Several blocks share a multiprocessor where there are more of them than multiprocessors.
        """
        flight = 128 * 1024 if self.blocks(outputs) <= MULTIPROCESSORS else 56 * 1024
        return min(self.most(depth), flight // (TILE * self.width * 2))

    def shared_bytes(self, depth: int, outputs: int) -> int:
        """Returns the shared memory that a block takes, about."""
        weights = self.stages(depth, outputs) * TILE * self.width * 2
        return weights + 2 * ROWS * 2 * _padded(self.window(depth)) + 2048


def _padded(window: int) -> int:
    """Returns a window's length with a whole number of tiles for each of the four warps."""
    return pl.cdiv(window, 4 * TILE) * 4 * TILE


@dataclasses.dataclass(frozen=True)
class Range:
    """Range of inputs that one block prepares and multiplies.

    Attributes:
      start: Of the window that it prepares; traced.
      window: Length of the window, the same for every block.
      first: Of the inputs that it multiplies; traced. They are within the window.
      last: The end of these; traced.
    """

    start: jax.Array
    window: int
    first: jax.Array
    last: jax.Array


def vector_layout(length: int) -> Any:
    """Returns the layout of a vector whose neighbors are in neighboring threads."""
    size = next(size for size in (4, 2, 1) if length % (128 * size) == 0)
    return plgpu.Layout.WG_STRIDED((length,), vec_size=size)


def heads_layout(width: int) -> Any:
    """Returns the layout of [4 * n, width]: a head in each warp, its columns over the lanes."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((4, width), (width // 32,))),
        warp_dims=(-3,),
        lane_dims=(-2,),
        vector_dim=-1,
    )


def norm_factor(squares, row: int | jax.Array, width: int, epsilon: float) -> jax.Array:
    """Returns RMSNorm's factor of a row, from references to the parts' sums of squares f32[P,8]."""
    total = functools.reduce(jnp.add, [squares[part, row] for part in range(squares.shape[0])])
    return jax.lax.rsqrt(total / width + epsilon)


def product(
    inputs: Sequence[jax.Array],
    weight: BFloat16[Array, "D F"],
    rows: int,
    split: Split,
    prepare: Callable,
    finish: Callable | None = None,
    extra: Sequence[jax.ShapeDtypeStruct] = (),
    name: str | None = None,
    interpret=None,
) -> tuple[jax.Array, ...]:
    """Returns the parts of prepared rows @ weight, f32[P,8,F], and the outputs of `finish`.

    Rows from `rows` on are undefined.

    Args:
      inputs: Arrays that `prepare` gets references to.
      rows: 1 to 8.
      prepare: (references, row, range) -> tuple of what `finish` needs too; its first entry is the
          window of the input, f32[window] or f32[n,H].
      finish: (references of `extra`, row, what `prepare` returned, part, range); called in one
          block of each part.
      extra: Shapes of the further outputs.
      name: Of the kernel, in profiles.
      interpret: plgpu.InterpretGPUParams to run on a CPU.
    """
    depth, outputs = weight.shape
    units, tiles = depth // split.unit, split.unit // TILE
    most, least = split.most(depth), units // split.parts * tiles
    window, stages = split.window(depth), split.stages(depth, outputs)
    padded = _padded(window)

    def body(*refs):
        *given, weights, plain, tiled, barriers = refs
        ins, w, out, extras = (
            given[: len(inputs)],
            given[len(inputs)],
            given[len(inputs) + 1],
            given[len(inputs) + 2 :],
        )
        block, part = jax.lax.axis_index("block"), jax.lax.axis_index("part")
        first = part * units // split.parts * tiles
        count = (part + 1) * units // split.parts * tiles - first
        start = jnp.minimum(first * TILE, depth - window)
        span = Range(start, window, first * TILE, (first + count) * TILE)

        def load(tile, stage):
            source = w.at[
                pl.ds((first + tile) * TILE, TILE), pl.ds(block * split.width, split.width)
            ]
            plgpu.copy_gmem_to_smem(source, weights.at[stage], barriers.at[stage])

        # 1) Weights.
        for tile in range(stages):
            if tile < least:
                load(tile, tile)
            else:
                pl.when(tile < count)(functools.partial(load, tile, tile))

        # 2) Rows. All are read before the first is stored, since stores are barriers.
        if rows < ROWS:
            zeros = plgpu.Layout.WG_STRIDED((ROWS, padded), vec_size=4)
            plain[...] = plgpu.layout_cast(jnp.zeros((ROWS, padded), jnp.bfloat16), zeros)
        prepared = [prepare(ins, row, span) for row in range(rows)]
        for row, (value, *_) in enumerate(prepared):
            target, value = plain.at[row, pl.ds(0, window)], value.astype(jnp.bfloat16)
            if interpret is None:
                target.reshape(value.shape)[...] = value
            else:  # which cannot reshape references
                target[...] = value.reshape(window)
        layout = plgpu.Layout.SMEM_GMEM_COPY((ROWS, padded), jnp.bfloat16, 128)
        tiled[...] = plgpu.load(plain, layout=layout, optimized=False)
        plgpu.commit_smem()
        if finish is not None:
            # Each row in a block of its own, as far as there are as many.
            for row, values in enumerate(prepared):
                owner = row % (outputs // split.width)
                pl.when(block == owner)(functools.partial(finish, extras, row, values, part, span))

        # 3) The product.
        shift = first - start // TILE

        def multiply(total):
            def add_tile(tile, _):
                stage = jax.lax.rem(tile, stages)
                plgpu.barrier_wait(barriers.at[stage])
                x = tiled.at[:, pl.ds((shift + tile) * TILE, TILE)]
                plgpu.wgmma(total, weights.at[stage].transpose((1, 0)), x.transpose((1, 0)))
                if stages < most:
                    plgpu.wgmma_wait(0)
                    pl.when(tile + stages < count)(lambda: load(tile + stages, stage))

            jax.lax.fori_loop(0, count, add_tile, None)
            return total[...]

        result = pl.run_scoped(multiply, plgpu.ACC((split.width, ROWS), jnp.float32))

        # 4) This part of the sum.
        target = out.at[part, :, pl.ds(block * split.width, split.width)]
        target.transpose((1, 0))[...] = plgpu.layout_cast(result, _RESULT)

    transforms = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128))
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((split.parts, ROWS, outputs), jnp.float32), *extra],
        scratch_types=[
            plgpu.SMEM((stages, TILE, split.width), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((ROWS, padded), jnp.bfloat16),
            plgpu.SMEM((ROWS, padded), jnp.bfloat16, transforms=transforms),
            plgpu.Barrier(num_barriers=stages),
        ],
        # The last axis is the fastest: neighbors read the same rows of the weights.
        grid=(split.parts, outputs // split.width),
        grid_names=("part", "block"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name=name,
        interpret=interpret,
    )
    return tuple(kernel(*inputs, weight))
