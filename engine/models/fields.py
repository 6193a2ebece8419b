"""The table every config field stands in: used, must equal a value, or ignored because of a reason.

A field that is in no row, or holds a value its row does not allow, refuses at load by name: what we do not know may
change the numbers.
"""

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Used:
    """Read by describe(), which checks the value."""


@dataclass(frozen=True)
class Only:
    """Accepted when it is one of `values` (null and absence always are); anything else is not supported."""

    values: tuple
    otherwise: str


@dataclass(frozen=True)
class Ignored:
    """Any value: it does not change what a text run computes."""

    because: str


USED = Used()


def only(*values, otherwise):
    return Only(values, otherwise)


def ignored(because, *names):
    return dict.fromkeys(names, Ignored(because))


# Fields that transformers writes into any config, whatever the model.
COMMON = {
    "architectures": Ignored("describe() has chosen the table by it"),
    **ignored("names the checkpoint, not its maths", "_name_or_path", "transformers_version", "auto_map",
              "unsloth_version", "unsloth_fixed"),
    **ignored("the engine's dtype argument decides", "torch_dtype", "dtype"),
    **ignored("training only", "attention_dropout", "initializer_range", "use_cache", "gradient_checkpointing"),
    **ignored("how transformers runs it, not what it computes", "_attn_implementation", "_attn_implementation_autoset",
              "attn_implementation", "cache_implementation", "return_dict", "output_attentions",
              "output_hidden_states", "torchscript", "use_bfloat16", "chunk_size_feed_forward", "pruned_heads",
              "tf_legacy_loss", "problem_type", "id2label", "label2id", "task_specific_params", "tokenizer_class",
              "finetuning_task", "prefix", "cross_attention_hidden_size", "bad_words_ids"),
    **ignored("generation defaults come from generation_config.json", "do_sample", "temperature", "top_k", "top_p",
              "max_length", "min_length", "num_beams", "num_beam_groups", "num_return_sequences", "early_stopping",
              "diversity_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
              "repetition_penalty", "return_dict_in_generate", "output_scores", "remove_invalid_values",
              "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "typical_p",
              "forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id", "sep_token_id"),
    **ignored("the tokenizer and the chat template insert them", "bos_token_id", "pad_token_id"),
    "eos_token_id": USED,
    "is_encoder_decoder": only(False, otherwise="an encoder-decoder model"),
    "is_decoder": Ignored("written by old transformers for plain decoders too"),
    "add_cross_attention": only(False, otherwise="cross-attention"),
    "tie_encoder_decoder": Ignored("there is no encoder"),
    "quantization_config": only(otherwise="a quantised checkpoint"),
    "compression_config": only(otherwise="a quantised checkpoint"),
}


def check_fields(config, table):
    """Holds every field of `config` (a loaders Config) against `table`; raises ConfigError at the first misfit."""
    for key in config:
        row = table.get(key)
        if row is None:
            raise config.error(key, "no such field: this engine does not know it and cannot promise to honour it; "
                                    "remove it if it does not change the maths")
        if isinstance(row, Only) and not any(_same(config.values[key], value) for value in row.values):
            allowed = " or ".join(json.dumps(value) for value in (*row.values, None))
            raise config.error(key, f"{allowed}; not supported: {row.otherwise}")


def _same(came, allowed):
    """Equal as JSON values: true is not 1."""
    return came == allowed and isinstance(came, bool) == isinstance(allowed, bool)
