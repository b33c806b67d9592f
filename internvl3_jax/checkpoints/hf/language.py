"""Reads the decoder's part of a released config.json: Qwen2, Qwen3 with or without experts,
InternLM2 or InternLM3.
"""

from internvl3_jax.checkpoints.hf.fields import LANGUAGE_IGNORED, Fields
from internvl3_jax.checkpoints.hf.keys import (
    EPSILON,
    EXPERTS,
    LANGUAGE,
    NUMBER_OF_EXPERTS,
    bounds,
    read_keys,
)
from internvl3_jax.config import LanguageConfig
from internvl3_jax.io import limits
from internvl3_jax.io.strict_json import JsonError
from internvl3_jax.io.terminal import excerpt


def read_language(
    values: dict, where: str = "config.json: config", *, tied: bool
) -> LanguageConfig:
    """Reads the decoder's configuration.

    A "llama" is InternLM3: transformers reads it so, and converted 9B checkpoints say so.
    """
    fields = Fields(values, where)
    fields.expect(
        "model_type",
        *("qwen2", "qwen3", "qwen3_moe", "internlm2", "internlm3", "llama"),
        default="absent",
    )
    family = "internlm3" if values["model_type"] == "llama" else values["model_type"]
    fields.expect("hidden_act", "silu")
    fields.expect("use_sliding_window", False)
    fields.expect("pretraining_tp", 1)
    fields.expect("use_mrope", False)
    sizes = read_keys(fields, LANGUAGE)
    layers, heads, hidden = (sizes[name] for name in ("num_layers", "num_heads", "hidden_size"))
    kinds = fields.list_of("layer_types", str, [], choices=("full_attention",))
    if len(kinds) not in (0, layers):
        raise JsonError(
            f"{where}: layer_types has {len(kinds)} elements, but num_hidden_layers is {layers}"
        )
    if fields.get("moe_config", dict, None):
        fields.refuse("moe_config", "mixture of experts is not supported")
    qkv_bias, o_bias, mlp_bias = _biases(fields, family)
    if heads % sizes["num_kv_heads"]:
        fields.refuse("num_key_value_heads", f"it does not divide num_attention_heads {heads}")
    # Qwen3's heads together are not as wide as the model, so its file must say how wide they are.
    is_qwen3 = family in ("qwen3", "qwen3_moe")
    required = {} if is_qwen3 else {"default": None}
    head_dim = fields.get("head_dim", int, **required, low=2, high=1 << 14)
    if head_dim is None and hidden % heads:
        fields.refuse(
            "num_attention_heads",
            f"it does not divide hidden_size {hidden}, and head_dim is missing",
        )
    theta, scaling, factor = _rope(fields, sizes["max_position"])
    fields.get("tie_word_embeddings", bool, None)
    eps = {"default": 1e-6} if is_qwen3 or family == "qwen2" else {}
    language = LanguageConfig(
        **sizes,
        head_dim=head_dim or hidden // heads,
        norm_eps=float(fields.get("rms_norm_eps", float, **eps, **EPSILON)),
        rope_theta=float(theta),
        rope_scaling=scaling,
        rope_factor=float(factor),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=is_qwen3,
        tie_embeddings=tied,
        **_experts(fields, family, layers),
        family=family,
    )
    fields.finish(LANGUAGE_IGNORED)
    return language


def _experts(fields: Fields, family: str, layers: int) -> dict:
    """Returns the fields of a mixture of experts, which is in every layer or in none."""
    if family != "qwen3_moe":
        return {}
    number = fields.same(NUMBER_OF_EXPERTS, int, low=1, high=65_536)
    experts = {"num_experts": number} | read_keys(fields, EXPERTS)
    if experts["experts_per_token"] > experts["num_experts"]:
        fields.refuse("num_experts_per_tok", f"there are {experts['num_experts']} experts")
    fields.expect("decoder_sparse_step", 1)
    fields.expect("mlp_only_layers", [])
    # Settings of training; this project has one of its own (loss.balance_weight).
    fields.get("router_aux_loss_coef", float, None)
    fields.get("output_router_logits", bool, None)
    return experts


def _biases(fields: Fields, family: str) -> tuple[bool, bool, bool]:
    """Returns whether q, k and v, o, and the MLP have biases."""
    if family == "qwen2":
        return True, False, False
    if family in ("qwen3", "qwen3_moe"):
        fields.expect("bias", False)
        # One flag for q, k, v and o, which no released model sets.
        bias = fields.get("attention_bias", bool, False)
        return bias, bias, False
    if family == "internlm2":
        # Its class takes a missing "bias" for true; its released models say false.
        bias = fields.get("bias", bool)
        return bias, bias, False
    qkv_bias = fields.same(("attention_bias", "qkv_bias"), bool, default=False)
    mlp_bias = fields.same(("mlp_bias", "bias"), bool, default=False)
    # The original InternLM3 gives o_proj the bias of the MLP, Llama the bias of q, k and v.
    return qkv_bias, mlp_bias if "bias" in fields.values else qkv_bias, mlp_bias


def _rope(fields: Fields, max_position: int) -> tuple[float, str, float]:
    """Returns (theta, scaling, factor) of rotary embedding.

    transformers 4 has rope_theta and rope_scaling, transformers 5 rope_parameters.
    """
    base, factors = bounds(limits.ROPE_THETA), bounds(limits.ROPE_FACTOR)
    blocks = [fields.fields(name, {}) for name in ("rope_parameters", "rope_scaling")]
    thetas, kinds = {fields.get("rope_theta", float, None, **base)}, set()
    for block in blocks:
        thetas.add(block.get("rope_theta", float, None, **base))
        kind = block.same(("rope_type", "type"), str, default="default")
        if kind not in ("default", "dynamic"):
            raise JsonError(
                f"{block.where} asks for {excerpt(kind)} rope; default and dynamic are supported"
            )
        if kind == "dynamic":
            kinds.add((kind, block.get("factor", float, **factors)))
            block.expect("original_max_position_embeddings", max_position)
        elif block.values:
            kinds.add(("none", block.get("factor", float, 1.0, **factors)))
        block.expect("partial_rotary_factor", 1.0)
        block.finish()
    thetas.discard(None)
    if len(thetas) != 1 or len(kinds) > 1:
        what = f"give {sorted(thetas)} with {sorted(kinds)}" if thetas else "give no base"
        raise JsonError(
            f"{fields.where}: rope_theta, rope_scaling and rope_parameters together {what}; one "
            "is needed"
        )
    scaling, factor = kinds.pop() if kinds else ("none", 1.0)
    return thetas.pop(), scaling, factor
