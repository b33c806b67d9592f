"""The two losses of InternVL3.5-Flash; see vico.py."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from internvl3_jax.config import LossConfig
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.training import vico
from internvl3_jax.training.objective import BatchTotals, SftLoss


@dataclasses.dataclass(frozen=True)
class VicoLoss(SftLoss):
    """Visual consistency: the answers with randomly compressed tiles are those of a reference.

    The loss is KL(reference || policy) of the trained tokens, weighted by batch["loss_weights"]. The
    reference model sees all tokens of every tile. Without a key all tiles are compressed.
    """

    config: LossConfig = LossConfig(kind="vico")

    def __call__(self, params, batch, key, loss_state, totals: BatchTotals, ref_params=None):
        compressed = jnp.ones(batch["tiles"].shape[:2], bool)
        if key is not None:
            draw, share = jax.random.fold_in(key, 2), self.config.compress_share
            compressed = vico.random_mix(draw, batch, share, self.model.config)
        reference = self.outputs(ref_params, batch)
        features, _ = self.features(params, batch, key)
        losses = self.losses(params, batch, features, compressed, reference, key)
        loss = (losses * batch["loss_weights"]).sum() / totals.weight
        return loss, (self.by_source(batch, jax.lax.stop_gradient(losses)), loss_state)

    def features(
        self, params: Mapping, batch: Mapping, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "B F D"], Float32[Array, "B N 2"]]:
        """Returns `InternVL.all_features` of the tiles. key: drops paths; None does not."""
        return self.model.apply(
            lora.variables(params, self.adapters, training=key is not None),
            batch["tiles"],
            key is None or not self.drop_path,
            rngs=None if key is None else {"drop_path": key},
            method=InternVL.all_features,
        )

    def losses(
        self,
        params: Mapping,
        batch: Mapping,
        features: Float[Array, "B F D"],
        compressed: Bool[Array, "B N"],
        reference: tuple[Float[Array, "B T D"], Float[Array, "D V"]],
        key: PRNGKeyArray | None = None,
    ) -> Float32[Array, "B T"]:
        """Returns the divergence at each token of the batch.

        Args:
          features: of `features`.
          compressed: which tiles are.
          reference: `outputs` of the reference model.
        """
        mixed, place = vico.compress_rows(batch, compressed, self.model.config)
        hidden, kernel = self.outputs(params, mixed | {"visual": features}, key)
        hidden = jnp.take_along_axis(hidden, place[..., None], axis=1)
        at_once = max(1, self.chunk // len(hidden))
        vocab_size = self.model.config.language.vocab_size
        return vico.divergence((hidden, kernel), reference, vocab_size, at_once)


@dataclasses.dataclass(frozen=True)
class RouterLoss(VicoLoss):
    """Cross-entropy of the router: whether a tile's compression costs less than that of others.

    `router_tiles` tiles of each sample are judged, one after the other: the ratio of the sample's
    divergence with that tile compressed and with none is compared with a quantile of the last
    ratios. Below it the tile is to be compressed. Nothing but the router has a gradient.
    """

    def init(self) -> vico.RatioWindow:
        return vico.init_window(self.config.router_window)

    def __call__(self, params, batch, key, loss_state, totals: BatchTotals, ref_params=None):
        # 1) Features and the router's logits: the first is that of compression.
        frozen = jax.lax.stop_gradient(params)
        features, logits = self.features(frozen | {"flash": params["flash"]}, batch)
        # 2) What the compression of a tile costs its sample.
        draw = jax.random.key(0) if key is None else jax.random.fold_in(key, 2)
        samples = vico.samples_of_tiles(batch, self.model.config)
        turns = vico.turns_of_tiles(draw, samples)
        judged = (samples > 0) & (turns < self.config.router_tiles)
        reference = self.outputs(ref_params, batch)
        ratios, without = self.ratios(
            frozen, batch, jax.lax.stop_gradient(features), reference, turns, samples
        )
        # 3) The target, by the last ratios.
        if key is not None:
            loss_state = vico.add_ratios(loss_state, ratios, judged)
        is_cheap = ratios < vico.threshold(loss_state, self.config.router_share)
        # 4) Cross-entropy: the mean of the tiles of a sample, then of samples.
        found = jax.nn.log_softmax(logits)
        losses = -jnp.where(is_cheap, found[..., 0], found[..., 1])
        weights = judged / vico.tiles_alike(judged, samples)
        is_right = (logits[..., 0] > logits[..., 1]) == is_cheap
        counted = {"accuracy": is_right, "cheap": is_cheap, "tiles": True}
        metrics = {
            f"router_{name}": jnp.where(judged, value, False).sum().astype(jnp.float32)
            for name, value in counted.items()
        }
        metrics |= self.by_source(batch, without)
        return (losses * weights).sum() / totals.samples, (metrics, loss_state)

    def ratios(
        self,
        params: Mapping,
        batch: Mapping,
        features: Float[Array, "B F D"],
        reference: tuple[Float[Array, "B T D"], Float[Array, "D V"]],
        turns: Int32[Array, "B N"],
        samples: Int32[Array, "B N"],
    ) -> tuple[Float32[Array, "B N"], Float32[Array, "B T"]]:
        """Returns the ratios of the tiles that are judged, and the divergence without compression.

        Args:
          features, reference: as of `losses`.
          turns: of `vico.turns_of_tiles`.
          samples: of `vico.samples_of_tiles`.
        """
        none = jnp.zeros(turns.shape, bool)
        without = self.losses(params, batch, features, none, reference)

        def cost(turn):
            compressed = (samples > 0) & (turns == turn)
            losses = self.losses(params, batch, features, compressed, reference)
            return jnp.where(compressed, vico.tile_losses(losses, batch, samples), 0.0)

        costs = jax.lax.map(cost, jnp.arange(self.config.router_tiles)).sum(axis=0)
        base = vico.tile_losses(without, batch, samples)
        return costs / jnp.maximum(base, vico.FLOOR), without

    def finish(self, loss_state: vico.RatioWindow, metrics: dict):
        tiles = jnp.maximum(metrics["router_tiles"], 1.0)
        shares = {name: metrics[name] / tiles for name in ("router_accuracy", "router_cheap")}
        return loss_state, shares | {
            "router_threshold": vico.threshold(loss_state, self.config.router_share)
        }
