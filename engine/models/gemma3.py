"""Gemma 3 decoder: five sliding layers to one global, two RoPE bases, QK norm, four norms a layer.

Source: Gemma 3 report section 2; HF modeling_gemma3. RMSNorm weights are stored centred on 0 (norm_offset 1).
"""

from dataclasses import replace
from math import isqrt

from engine.models import vision
from engine.models.common import GLOBAL, SLIDING, head_dim, is_tied, kv_heads, layer_types, refuse_unknown
from engine.models.fields import COMMON, USED, Ignored, check_fields, only
from engine.models.spec import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, RopeSpec

TEXT_FIELDS = {
    **COMMON,
    "model_type": only("gemma3_text", otherwise="another model"),
    **dict.fromkeys(["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window", "layer_types",
                     "sliding_window_pattern", "rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters",
                     "rms_norm_eps", "max_position_embeddings", "final_logit_softcapping", "tie_word_embeddings"],
                    USED),
    "hidden_activation": only("gelu_pytorch_tanh", otherwise="another activation"),
    "hidden_act": Ignored("a duplicate; hidden_activation is the field that counts"),
    "_sliding_window_pattern": Ignored("layer_types or sliding_window_pattern decide; HF ignores this spelling too"),
    "attention_bias": only(False, otherwise="projections with biases"),
    "attn_logit_softcapping": only(otherwise="a softcap on attention scores"),
    "use_bidirectional_attention": only(False, otherwise="an embedding model, which cannot generate"),
    "interleaved_rope_weights": only(False, otherwise="q and k rows permuted for interleaved RoPE pairs"),
}

MULTIMODAL_FIELDS = {
    **COMMON,
    "model_type": only("gemma3", otherwise="another model"),
    "text_config": USED,
    "tie_word_embeddings": USED,
    # Without a vision_config there is nothing that these speak of.
    **dict.fromkeys(["vision_config", "mm_tokens_per_image", "image_token_index", "image_token_id", "boi_token_index",
                     "boi_token_id", "eoi_token_index", "eoi_token_id"], USED),
}

UNUSED_IN_TEXT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
# (spellings: released files', transformers' attribute; what it is where a file leaves it out)
IMAGE, BEGIN, END = ((("image_token_index", "image_token_id"), 262144), (("boi_token_index", "boi_token_id"), 255999),
                     (("eoi_token_index", "eoi_token_id"), 256000))


def describe_text(config):
    """ModelSpec of Gemma3ForCausalLM. `config` is the flat loaders Config. Raises ConfigError."""
    check_fields(config, TEXT_FIELDS)
    return _describe(config, tied=config.bool("tie_word_embeddings", True), eos_ids=config.ids("eos_token_id"),
                     logit_softcap=config.float("final_logit_softcapping", None))


def describe_multimodal(config):
    """ModelSpec of Gemma3ForConditionalGeneration, whose text fields sit in `text_config`; without a `vision_config` it
    takes no pictures."""
    check_fields(config, MULTIMODAL_FIELDS)
    text = config.section("text_config")
    check_fields(text, TEXT_FIELDS)
    if "final_logit_softcapping" in text:
        raise text.error("final_logit_softcapping", "null: implementations disagree on it in the multimodal class")
    return _describe(text, tied=is_tied(config, text), logit_softcap=None, unused=UNUSED_IN_TEXT,
                     eos_ids=config.ids("eos_token_id") or text.ids("eos_token_id"), media=_media(config, text))


def _vocab(text):
    return text.int("vocab_size", 262208)


def _media(config, text):
    """The MediaSpec, or None for a file without a vision part."""
    section = config.section("vision_config", None)
    if section is None:
        return None
    n_soft = config.int("mm_tokens_per_image", 256)
    if isqrt(n_soft)**2 != n_soft:
        raise config.error("mm_tokens_per_image", "a square number")
    return vision.media(config, _vocab(text), vision.siglip(section, n_soft), image=IMAGE, begin=BEGIN, end=END)


def _describe(config, *, tied, eos_ids, logit_softcap, unused=(), media=None):
    # Released 4B to 27B files leave out whatever equals the class default, so the defaults here are the format's, not
    # ours. No release leaves out the three sizes without one.
    hidden = config.int("hidden_size")
    n_heads = config.int("num_attention_heads", 8)
    sliding_rope, global_rope = _ropes(config)
    attention = AttentionSpec(
        n_heads=n_heads, n_kv_heads=kv_heads(config, "num_key_value_heads", n_heads, 4),
        head_dim=head_dim(config, "head_dim", 256), rope=global_rope,
        scale=config.float("query_pre_attn_scalar", 256.0) ** -0.5, sees_blocks=media is not None)
    kinds = {GLOBAL: attention,
             SLIDING: replace(attention, rope=sliding_rope, window=config.int("sliding_window", 4096))}
    mlp = DenseSpec(config.int("intermediate_size"))
    return ModelSpec(
        architecture="gemma3", hidden=hidden, vocab=_vocab(config),
        layers=tuple(LayerSpec(kinds[kind], mlp)
                     for kind in layer_types(config, config.int("sliding_window_pattern", 6))),
        norm_eps=config.float("rms_norm_eps", 1e-6), norm_offset=1.0, embed_scale=hidden**0.5,
        logit_softcap=logit_softcap, max_positions=config.int("max_position_embeddings", 131072), tied=tied,
        eos_ids=eos_ids, unused_prefixes=unused, media=media)


def _ropes(config):
    """(sliding, global) RopeSpec from the flat spelling, the nested one, or a mixture: a base that the nested form
    leaves out comes from the flat field. Linear scaling is for global layers only."""
    nested = config.section("rope_parameters", None)
    local_base, global_base = config.float("rope_local_base_freq", 10_000.0), config.float("rope_theta", 1_000_000.0)
    if nested is None:
        return RopeSpec(local_base), _rope(config.section("rope_scaling", None), global_base)
    refuse_unknown(nested, (SLIDING, GLOBAL))
    sliding = _rope(nested.section(SLIDING, None), local_base)
    if sliding.factor != 1:
        raise nested.section(SLIDING).error("factor", "no scaling on sliding layers")
    # HF 5 keeps a flat rope_scaling beside rope_parameters in files it did not write itself; they must not differ.
    scaled = _rope(nested.section(GLOBAL, None), global_base)
    flat = _rope(config.section("rope_scaling", None), scaled.theta)
    if "rope_scaling" in config and flat != scaled:
        raise config.error("rope_scaling", f"the same scaling as rope_parameters.{GLOBAL} (factor {scaled.factor})")
    return sliding, scaled


def _rope(section, base):
    """One scaling entry: null or {"rope_type" or "type": "default" | "linear", "factor", "rope_theta"}."""
    if section is None:
        return RopeSpec(base)
    refuse_unknown(section, ("rope_type", "type", "factor", "rope_theta"))
    kind_key = "rope_type" if "rope_type" in section else "type"
    kind = section.str(kind_key, "default", one_of=("default", "linear"))
    factor = section.float("factor") if kind == "linear" else section.float("factor", 1.0)
    if kind == "default" and factor != 1:
        raise section.error("factor", "1, or rope_type linear")
    return RopeSpec(section.float("rope_theta", base), factor=factor)
