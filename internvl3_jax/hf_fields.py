"""Strict reading of one JSON object of a released config.json, and the names in it that change nothing."""

import difflib


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields that any transformers configuration may carry and that do not change what the network computes. Token ids of begin, end
# and padding are among them: the stop token comes from the template and the tokenizer (llm_config names another eos than the
# real one).
GENERIC = _words(
    """_attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures attn_implementation auto_map
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16
    use_cache initializer_range"""
)
VISION_IGNORED = GENERIC | _words(
    """attention_dropout attention_probs_dropout_prob capacity_factor dropout eval_capacity_factor hidden_dropout_prob
    initializer_factor laux_allreduce moe_coeff_ratio moe_intermediate_size moe_output_scale
    noisy_gate_policy num_experts num_routed_experts num_shared_experts projection_dropout shared_expert_intermediate_size
    tie_word_embeddings use_flash_attn use_residual use_rts use_weighted_residual"""
)
LANGUAGE_IGNORED = GENERIC | _words("attention_dropout max_window_layers rope_pos_id_version rope_pos_id_stride sliding_window")
TOP_IGNORED = GENERIC | _words("image_fold hidden_size")

_REQUIRED = object()


class Fields:
    """One JSON object of the configuration; remembers which names were asked for, so that the rest can be refused."""

    def __init__(self, values, where: str):
        if values is None:
            raise ValueError(f"config.json: {where} is missing")
        self.values, self.where, self.asked = values, where, set()

    def get(self, name: str, default=_REQUIRED):
        """The field's value; null counts as absent. A field without default must be there."""
        self.asked.add(name)
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(
                f"config.json: {self.where}.{name} is missing; the classes that read it disagree about its default"
            )
        return default

    def expect(self, name: str, *supported, default=None) -> None:
        """Refuses a value that this implementation does not compute; `default` is what an absent field means."""
        value = self.get(name, supported[0] if default is None else default)
        if value not in supported:
            wanted = " or ".join(repr(choice) for choice in supported)
            raise ValueError(f"config.json: {self.where}.{name} = {value!r} is not supported; this model has {wanted}")

    def same(self, names: tuple[str, ...], default=_REQUIRED):
        """A field with several spellings; they must agree where more than one is given."""
        given = {name: self.get(name, None) for name in names}
        values = [value for value in given.values() if value is not None]
        if not values:
            return self.get(names[0], default)
        if any(value != values[0] for value in values):
            raise ValueError(f"config.json: {self.where} contradicts itself: {given}")
        return values[0]

    def finish(self, ignored: frozenset[str]) -> None:
        known = self.asked | ignored
        for name in self.values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"config.json: unknown field {self.where}.{name} = {self.values[name]!r}{hint}")
