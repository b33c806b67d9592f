"""Predicted time of a train step on one GPU, from the kernels of the compiled program.

    products    FLOPs of products with weights, at the rate that large products reach
    attention   FLOPs of fused attention, at the rate of its head width
    memory      bytes of all other kernels, at the bandwidth that a copy reaches
    launches    a fixed time for each kernel

The four are added: on one GPU kernels run one after the other. The rates are shares of the data
sheet, read from published measurements of an H100 and not measured here: 8,192-wide bfloat16
products on random data, cuDNN's attention at 1,000 to 4,000 tokens, a device-to-device copy, and
launches within a CUDA graph.
"""

import dataclasses

from internvl3_jax.config import TrainConfig
from internvl3_jax.fit.kernels import Program
from internvl3_jax.fit.step_cost import StepCost
from internvl3_jax.model.ops.remat import recomputes_attention
from internvl3_jax.training.hardware import Chip

_PRODUCTS = 0.66
_ATTENTION = {64: 0.35, 128: 0.55}
_MEMORY = 0.9
_LAUNCH = 1.4e-6
# Forward and backward pass of attention, in units of the forward pass.
_PASSES = 3.5


@dataclasses.dataclass(frozen=True)
class GpuTime:
    """Seconds of a step, by kind of kernel, and the model FLOPs utilization."""

    products: float
    attention: float
    memory: float
    launches: float
    mfu: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory + self.launches


def predict(program: Program, cost: StepCost, config: TrainConfig, chip: Chip) -> GpuTime:
    """Returns the time of a train step whose attention runs in fused kernels."""
    language, vision = config.model.language, config.model.vision
    attention = {}
    recomputed = 0.0
    for part, scope, sizes, policy in (
        ("tower", "vision/", vision, config.remat_vision),
        ("decoder", "language/", language, config.remat_language),
    ):
        flops = cost.computed[f"{part}, attention"]
        # Each layer runs the forward kernel, perhaps again under remat, and the backward kernel.
        again = program.select("attention", scope).launches / sizes.num_layers - 2
        attention[part] = (flops * (1 + again / _PASSES), sizes.head_dim)
        recomputed += flops / _PASSES if recomputes_attention(policy, tpu=False) else 0
    scores = sum(cost.computed[f"{part}, attention"] for part in attention) + recomputed
    others = sum(program.select(kind).bytes for kind in ("copy", "elementwise"))
    times = {
        "products": (sum(cost.computed.values()) - scores) / (_PRODUCTS * chip.flops),
        "attention": sum(
            flops / (_ATTENTION[64 if width < 128 else 128] * chip.flops)
            for flops, width in attention.values()
        ),
        "memory": others / (_MEMORY * chip.memory_bytes),
        "launches": program.launches * _LAUNCH,
    }
    return GpuTime(**times, mfu=cost.needed / chip.flops / sum(times.values()))
