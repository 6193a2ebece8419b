"""Gemma 4 dense text decoder: two head dims, partial RoPE and K=V on global layers, V norm, a scalar per layer.

Source: Gemma 4 model cards; HF modeling_gemma4. RMSNorm weights multiply directly (norm_offset 0).
"""

from engine.models.common import GLOBAL, SLIDING, head_dim, kv_heads, layer_types, refuse_unknown
from engine.models.fields import COMMON, USED, check_fields, ignored, only
from engine.models.spec import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, RopeSpec

TEXT_FIELDS = {
    **COMMON,
    **dict.fromkeys(["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "global_head_dim", "num_global_key_value_heads",
                     "per_layer_config", "attention_k_eq_v", "sliding_window", "layer_types", "rope_parameters",
                     "rms_norm_eps", "max_position_embeddings", "final_logit_softcapping", "tie_word_embeddings",
                     "hidden_size_per_layer_input"], USED),
    "hidden_activation": only("gelu_pytorch_tanh", otherwise="another activation"),
    "attention_bias": only(False, otherwise="projections with biases"),
    "attn_logit_softcapping": only(otherwise="a softcap on attention scores"),
    "query_pre_attn_scalar": only(otherwise="Gemma 4 attention is unscaled"),
    "interleaved_rope_weights": only(False, otherwise="q and k rows permuted for interleaved RoPE pairs"),
    "use_bidirectional_attention": only("vision", False, otherwise="an encoder, which cannot generate"),
    "enable_moe_block": only(False, otherwise="the MoE models (26B-A4B)"),
    "num_kv_shared_layers": only(0, otherwise="KV-shared layers (E2B, E4B)"),
    "use_double_wide_mlp": only(False, otherwise="double-wide MLPs (E2B)"),
    **ignored("sizes of the MoE block, which enable_moe_block turns on", "num_experts", "top_k_experts",
              "moe_intermediate_size"),
    **ignored("the per-layer table's size, which hidden_size_per_layer_input turns on", "vocab_size_per_layer_input"),
}

MULTIMODAL_FIELDS = {
    **COMMON,
    "text_config": USED,
    "tie_word_embeddings": USED,
    **ignored("the vision and audio parts do not run yet; text prompts do not need them", "vision_config",
              "audio_config", "image_token_id", "video_token_id", "audio_token_id", "boi_token_id", "eoi_token_id",
              "boa_token_id", "eoa_token_id", "eoa_token_index", "vision_soft_tokens_per_image"),
}

UNUSED_IN_TEXT = tuple(prefix + part for part in ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.",
                                                  "vision_embedder.") for prefix in ("model.", ""))


def describe_text(config):
    """ModelSpec of Gemma4ForCausalLM. `config` is the flat loaders Config. Raises ConfigError."""
    return _describe(config, tied=config.bool("tie_word_embeddings", True), unused=())


def describe_multimodal(config):
    """ModelSpec of the text part of Gemma4ForConditionalGeneration and its unified (12B) sibling."""
    check_fields(config, MULTIMODAL_FIELDS)
    text = config.section("text_config")
    tied = text.bool("tie_word_embeddings", config.bool("tie_word_embeddings", True))
    return _describe(text, tied=tied, unused=UNUSED_IN_TEXT)


def _describe(config, tied, unused):
    check_fields(config, TEXT_FIELDS)
    # The class default of 256 means that an absent key turns per-layer inputs on; the unified text type has none.
    has_none = config.str("model_type", "") == "gemma4_unified_text"
    if config.int("hidden_size_per_layer_input", 0 if has_none else 256, least=0):
        raise config.error("hidden_size_per_layer_input",
                           "0: per-layer inputs (E2B, E4B; absent means on) are not supported yet")
    hidden, n_layers = config.int("hidden_size"), config.int("num_hidden_layers")
    kinds = layer_types(config, n_layers, 6)
    mlp = DenseSpec(config.int("intermediate_size"))
    return ModelSpec(
        architecture="gemma4", hidden=hidden, vocab=config.int("vocab_size", 262144),
        layers=tuple(LayerSpec(attention, mlp, layer_scalar=True) for attention in _attentions(config, kinds)),
        norm_eps=config.float("rms_norm_eps", 1e-6), norm_offset=0.0, embed_scale=hidden**0.5,
        logit_softcap=config.float("final_logit_softcapping", None),
        max_positions=config.int("max_position_embeddings", 131072), tied=tied, unused=unused)


def _attentions(config, kinds):
    """The AttentionSpec of each layer. Released files give global layers their sizes in `global_head_dim` and
    `num_global_key_value_heads`; files re-saved by transformers 5 in `per_layer_config` instead, by layer number."""
    n_heads = config.int("num_attention_heads", 8)
    v_is_k = config.bool("attention_k_eq_v", False)
    n_kv_heads = kv_heads(config, "num_key_value_heads", n_heads, 4)
    dims = {SLIDING: head_dim(config, "head_dim", 256), GLOBAL: head_dim(config, "global_head_dim", 512)}
    n_kv = dict.fromkeys(dims, n_kv_heads)
    if v_is_k:
        n_kv[GLOBAL] = kv_heads(config, "num_global_key_value_heads", n_heads, n_kv_heads)
    ropes = _ropes(config.section("rope_parameters", None))
    own = _per_layer(config, len(kinds))
    for i, kind in enumerate(kinds):
        dim = head_dim(own[i], "head_dim", dims[kind]) if i in own else dims[kind]
        n = kv_heads(own[i], "num_key_value_heads", n_heads, n_kv[kind]) if i in own else n_kv[kind]
        yield AttentionSpec(n_heads=n_heads, n_kv_heads=n, head_dim=dim, scale=1.0, rope=ropes[kind],
                            window=config.int("sliding_window", 512) if kind == SLIDING else None,
                            v_norm=True, v_is_k=v_is_k and kind == GLOBAL)


def _per_layer(config, n_layers):
    """`per_layer_config` as {layer number: Config}; keys may be zero-padded ("05")."""
    section = config.section("per_layer_config", None)
    layers = {}
    for key in section if section else ():
        if not key.isdecimal() or int(key) >= n_layers:
            raise section.error(key, f"layer numbers 0..{n_layers - 1} as keys")
        layer = section.section(key)
        refuse_unknown(layer, ("head_dim", "num_key_value_heads"))
        layers[int(key)] = layer
    return layers


def _ropes(section):
    """{kind: RopeSpec}. Sliding layers rotate every dimension, global ones the "proportional" quarter."""
    ropes = {SLIDING: RopeSpec(10_000.0), GLOBAL: RopeSpec(1_000_000.0, partial=0.25)}
    if section is not None:
        refuse_unknown(section, tuple(ropes))
        ropes = {kind: _rope(section.section(kind, None), default) for kind, default in ropes.items()}
    return ropes


def _rope(section, default):
    """One of {"rope_type": "default", "rope_theta"}, {"rope_type": "proportional", ..., "partial_rotary_factor",
    "factor"}; what it leaves out is taken from `default`."""
    if section is None:
        return default
    refuse_unknown(section, ("rope_type", "rope_theta", "partial_rotary_factor", "factor"))
    theta = section.float("rope_theta", default.theta)
    if section.str("rope_type", "default" if default.partial == 1 else "proportional",
                   one_of=("default", "proportional")) == "default":
        if section.float("partial_rotary_factor", 1.0) != 1:
            raise section.error("partial_rotary_factor", "1, or rope_type proportional")
        return RopeSpec(theta)
    partial = section.float("partial_rotary_factor", default.partial)
    if partial > 1:
        raise section.error("partial_rotary_factor", "a number in (0, 1]")
    return RopeSpec(theta, section.float("factor", 1.0), partial)
