"""Strict reading of one JSON object of a released config.json, and the keys that are ignored."""

from internvl3_jax.io.strict_json import JsonError, Object, describe
from internvl3_jax.io.terminal import excerpt


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys that any transformers configuration may have and that do not change the network's output.
# Ids of begin, end and padding tokens are among them: the stop token comes from the template and
# the tokenizer (llm_config names another eos than the real one).
GENERIC = _words(
    """_attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    use_bfloat16 use_cache initializer_range"""
)
VISION_IGNORED = GENERIC | _words(
    """attention_dropout attention_probs_dropout_prob capacity_factor dropout eval_capacity_factor
    hidden_dropout_prob initializer_factor laux_allreduce moe_coeff_ratio moe_intermediate_size
    moe_output_scale noisy_gate_policy num_experts num_routed_experts num_shared_experts
    projection_dropout shared_expert_intermediate_size tie_word_embeddings use_flash_attn
    use_fa3 use_residual use_rts use_weighted_residual"""
)
# The second line: how training code after InternVL3 was run (expert parallelism, checkpointing).
LANGUAGE_IGNORED = GENERIC | _words(
    """attention_dropout max_window_layers rope_pos_id_version rope_pos_id_stride sliding_window
    debug ep_size micro_forward skip_checkpoint use_deepep"""
)
TOP_IGNORED = GENERIC | _words("image_fold hidden_size")
# Keys of GENERIC that would change the network with other values than these.
_NEUTRAL = {
    "pruned_heads": ({},),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
}
_REQUIRED = object()


class Fields(Object):
    """A `strict_json.Object` with the checks that a model configuration needs."""

    def __init__(self, values, where: str):
        if values is None:
            raise JsonError(f"{where} is missing")
        super().__init__(values, where)

    def fields(self, name: str, default=_REQUIRED) -> "Fields":
        """Returns a key's object."""
        return Fields(
            self.get(name, dict) if default is _REQUIRED else self.get(name, dict, default),
            f"{self.where}.{name}",
        )

    def expect(self, name: str, *supported, default=None, remedy: str = "") -> None:
        """Refuses values that are not supported; `default` is that of an absent key."""
        self.asked.add(name)
        value = self.values.get(name)
        value = (supported[0] if default is None else default) if value is None else value
        if not any(_equal(value, choice) for choice in supported):
            wanted = " or ".join(repr(choice) for choice in supported)
            raise JsonError(
                f"{self.where}: {name} is {excerpt(value)}; supported: {wanted}{remedy}"
            )

    def same(self, names: tuple[str, ...], kind: type, default=_REQUIRED, **bounds):
        """Returns a key with several spellings, which must agree if more than one is given."""
        values_by_name = {name: self.get(name, kind, None, **bounds) for name in names}
        values = [value for value in values_by_name.values() if value is not None]
        if not values:
            return self.get(names[0], kind) if default is _REQUIRED else default
        if any(value != values[0] for value in values):
            raise JsonError(f"{self.where} contradicts itself: {excerpt(values_by_name)}")
        return values[0]

    def refuse(self, name: str, why: str) -> None:
        """Raises the error about a key of the right type with a wrong value."""
        raise JsonError(f"{self.where}: {name} is {excerpt(self.values.get(name))}; {why}")

    def finish(self, ignored=()) -> None:
        """Refuses every key that was neither read nor is in `ignored`."""
        for name, value in self.values.items():
            if "quant" in name or name == "compression_config":
                if value is not None:
                    raise JsonError(
                        f"{self.where}: {excerpt(name)} is {describe(value)}; quantized "
                        "checkpoints are not read, take the model's original weights"
                    )
                self.asked.add(name)
        for name in _NEUTRAL.keys() & ignored:
            self.expect(name, *_NEUTRAL[name])
        super().finish(ignored)


def _equal(value, choice) -> bool:
    """Compares without taking true for 1 or false for 0."""
    return value == choice and isinstance(value, bool) == isinstance(choice, bool)
