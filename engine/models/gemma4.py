"""Gemma 4 decoders: two head dims, partial RoPE and K=V on global layers, V norm, a scalar per layer.

The MoE model (26B-A4B) has experts beside each dense MLP. In the E-series a second embedding table feeds every layer,
and the last layers read the K and V of the last one of their kind before them.
Source: Gemma 4 model cards; HF modeling_gemma4. RMSNorm weights multiply directly (norm_offset 0).
"""

from dataclasses import replace

from engine.models import vision
from engine.models.common import (
    GLOBAL,
    SLIDING,
    experts_per_token,
    head_dim,
    is_tied,
    kv_heads,
    layer_types,
    refuse_unknown,
)
from engine.models.fields import COMMON, USED, check_fields, ignored, only
from engine.models.spec import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, MoeSpec, RopeSpec

TEXT_FIELDS = {
    **COMMON,
    "model_type": only("gemma4_text", "gemma4_unified_text", otherwise="another model"),
    **dict.fromkeys(["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "global_head_dim", "num_global_key_value_heads",
                     "per_layer_config", "attention_k_eq_v", "sliding_window", "layer_types", "rope_parameters",
                     "rms_norm_eps", "max_position_embeddings", "final_logit_softcapping", "tie_word_embeddings",
                     "hidden_size_per_layer_input", "vocab_size_per_layer_input", "num_kv_shared_layers",
                     "use_double_wide_mlp", "enable_moe_block", "num_experts", "top_k_experts",
                     "moe_intermediate_size"], USED),
    "hidden_activation": only("gelu_pytorch_tanh", otherwise="another activation"),
    "attention_bias": only(False, otherwise="projections with biases"),
    "attn_logit_softcapping": only(otherwise="a softcap on attention scores"),
    "query_pre_attn_scalar": only(otherwise="scaled attention, which Gemma 4 has not"),
    "interleaved_rope_weights": only(False, otherwise="q and k rows permuted for interleaved RoPE pairs"),
    "use_bidirectional_attention": only("vision", False, otherwise="an encoder, which cannot generate"),
}

MULTIMODAL_FIELDS = {
    **COMMON,
    "model_type": only("gemma4", "gemma4_unified", otherwise="another model"),
    "text_config": USED,
    "tie_word_embeddings": USED,
    # Without a vision_config there is nothing that these speak of.
    **dict.fromkeys(["vision_config", "image_token_id", "video_token_id", "audio_token_id", "boi_token_id",
                     "eoi_token_id"], USED),
    **ignored("the audio part does not run yet; other prompts do not need it", "audio_config", "boa_token_id",
              "eoa_token_id", "eoa_token_index"),
    **ignored("the request, or else the processor's file, says how many soft tokens", "vision_soft_tokens_per_image"),
}
# In a file with a vision part: the row of the second embedding table that soft tokens read, and what pictures see.
SEEING_TEXT_FIELDS = {**TEXT_FIELDS, "pad_token_id": USED, "use_bidirectional_attention": USED}

UNUSED_IN_TEXT = tuple(prefix + part for part in ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.",
                                                  "vision_embedder.") for prefix in ("model.", ""))
# (spellings; what it is where a file leaves it out)
IMAGE, BEGIN, END = (("image_token_id",), 258880), (("boi_token_id",), 255999), (("eoi_token_id",), 258882)
AUDIO = 258881


# What a key that is left out means, by text class. 256 turns per-layer inputs on; the unified class has none, nor
# experts.
ABSENT = {"hidden_size_per_layer_input": 256, "sliding_window": 512, "max_position_embeddings": 131072}
ABSENT_UNIFIED = {"hidden_size_per_layer_input": 0, "sliding_window": 1024, "max_position_embeddings": 262144}


def describe_text(config):
    """ModelSpec of Gemma4ForCausalLM. `config` is the flat loaders Config. Raises ConfigError."""
    return _describe(config, ABSENT, tied=config.bool("tie_word_embeddings", True), eos_ids=config.ids("eos_token_id"))


def describe_multimodal(config, absent=ABSENT, tower=vision.gemma4_tower):
    """ModelSpec of Gemma4ForConditionalGeneration, whose text fields sit in `text_config`; without a `vision_config` it
    takes no pictures."""
    check_fields(config, MULTIMODAL_FIELDS)
    text = config.section("text_config")
    return _describe(text, absent, tied=is_tied(config, text), unused=UNUSED_IN_TEXT,
                     eos_ids=config.ids("eos_token_id") or text.ids("eos_token_id"), media=_media(config, text, tower))


def describe_unified(config):
    """The same of Gemma4UnifiedForConditionalGeneration (12B), whose class has other defaults and no tower."""
    return describe_multimodal(config, ABSENT_UNIFIED, vision.block_embedder)


def _vocab(text):
    return text.int("vocab_size", 262144)


def _media(config, text, tower):
    """The MediaSpec, or None for a file without a vision part. Ids of media are looked up as pad wherever they stand.
    Source: HF modeling_gemma4, Gemma4Model.forward."""
    section = config.section("vision_config", None)
    if section is None:
        return None
    vocab, pad = _vocab(text), text.int("pad_token_id", 0, least=0)
    if pad >= vocab:
        raise text.error("pad_token_id", f"an id of the vocabulary, below {vocab}")
    media = vision.media(config, vocab, tower(section), image=IMAGE, begin=BEGIN, end=END, video="video_token_id",
                         pad=pad)
    ids = media.image_token, media.video_token, config.int("audio_token_id", AUDIO, least=0)
    return replace(media, unread=tuple(token for token in ids if token is not None and token < vocab))


def _describe(config, absent, *, tied, eos_ids, unused=(), media=None):
    check_fields(config, TEXT_FIELDS)
    hidden, vocab = config.int("hidden_size"), _vocab(config)
    per_layer_input = config.int("hidden_size_per_layer_input", absent["hidden_size_per_layer_input"], least=0)
    if absent is ABSENT_UNIFIED:
        if per_layer_input:
            raise config.error("hidden_size_per_layer_input", "0: the unified model has no per-layer inputs")
        if config.bool("enable_moe_block", False):
            raise config.error("enable_moe_block", "false: the unified model has no experts")
    return ModelSpec(
        architecture="gemma4", hidden=hidden, vocab=vocab, layers=tuple(_layers(config, absent, media)),
        norm_eps=config.float("rms_norm_eps", 1e-6), norm_offset=0.0, embed_scale=hidden**0.5,
        logit_softcap=config.float("final_logit_softcapping", None),
        max_positions=config.int("max_position_embeddings", absent["max_position_embeddings"]), tied=tied,
        eos_ids=eos_ids, unused_prefixes=unused, per_layer_input=per_layer_input,
        per_layer_vocab=_per_layer_vocab(config, vocab) if per_layer_input else 0, media=media)


def _per_layer_vocab(config, vocab):
    n_rows = config.int("vocab_size_per_layer_input", 262144)
    if n_rows < vocab:
        raise config.error("vocab_size_per_layer_input", f"at least the {vocab} ids of the vocabulary")
    return n_rows


def _layers(config, absent, media):
    """The LayerSpecs. Layers from the first shared one on read the K and V of the last layer of their kind before it,
    and may have MLPs of twice the width."""
    kinds = layer_types(config, 6)
    attentions = list(attention_specs(config, kinds, absent["sliding_window"], media, absent is ABSENT_UNIFIED))
    n_shared = config.int("num_kv_shared_layers", 0, least=0)
    first = len(kinds) - n_shared
    producers = {kind: i for i, kind in enumerate(kinds[:max(first, 0)])}
    if any(kind not in producers for kind in kinds):
        raise config.error("num_kv_shared_layers", f"to leave a layer of each kind, of {len(kinds)} layers, with K and "
                                                   "V of its own")
    width, wider = config.int("intermediate_size"), 2 if config.bool("use_double_wide_mlp", False) else 1
    for i, (kind, attention) in enumerate(zip(kinds, attentions, strict=True)):
        kv_from = producers[kind] if i >= first else None
        if kv_from is not None and attentions[kv_from] != attention:
            raise config.error("per_layer_config", f"layer {i} like layer {kv_from}, whose K and V it reads")
        mlp = _mlp(config, DenseSpec(width if kv_from is None else wider * width))
        yield LayerSpec(attention, mlp, layer_scalar=True, kv_from=kv_from)


def _mlp(config, dense):
    """The dense MLP of a layer, with the experts beside it where the model has them."""
    if not config.bool("enable_moe_block", False):
        return dense
    n_experts = config.int("num_experts")
    return MoeSpec(n_experts, experts_per_token(config, "top_k_experts", n_experts),
                   config.int("moe_intermediate_size"), dense, routing="softmax")


def attention_specs(config, kinds, default_window, media=None, sees_whole_blocks=False):
    """The AttentionSpec of each layer. Released files give global layers their sizes in `global_head_dim` and
    `num_global_key_value_heads`; files re-saved by transformers 5 in `per_layer_config` instead, by layer number, and
    a layer that it leaves out has the sizes of a sliding one.

    Where pictures are seen both ways, global layers are causal all the same, and windows cut. Not in the unified
    class: there every layer sees the whole of a picture. Source: HF modeling_gemma4, create_masks_for_vision_model;
    modeling_gemma4_unified, Gemma4UnifiedModel.forward.
    """
    n_heads = config.int("num_attention_heads", 8)
    v_is_k = config.bool("attention_k_eq_v", False)
    n_kv_heads, dim = kv_heads(config, "num_key_value_heads", n_heads, 4), head_dim(config, "head_dim", 256)
    sizes = {SLIDING: (n_kv_heads, dim), GLOBAL: (n_kv_heads, dim)}
    if "per_layer_config" not in config:
        n_global = kv_heads(config, "num_global_key_value_heads", n_heads, n_kv_heads)
        sizes[GLOBAL] = (n_global if v_is_k else n_kv_heads, head_dim(config, "global_head_dim", 512))
    own = _per_layer(config, len(kinds))
    ropes = _ropes(config.section("rope_parameters", None))
    window = config.int("sliding_window", default_window)
    sees_blocks = media is not None and config.values.get("use_bidirectional_attention") == "vision"
    is_whole = sees_blocks and sees_whole_blocks
    for i, kind in enumerate(kinds):
        n_kv_heads, dim = sizes[kind]
        if i in own:
            n_kv_heads = kv_heads(own[i], "num_key_value_heads", n_heads, n_kv_heads)
            dim = head_dim(own[i], "head_dim", dim)
        yield AttentionSpec(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=dim, scale=1.0, rope=ropes[kind],
                            window=window if kind == SLIDING else None, v_norm=True, v_is_k=v_is_k and kind == GLOBAL,
                            sees_blocks=is_whole or (sees_blocks and kind == SLIDING),
                            sees_whole_blocks=is_whole and kind == SLIDING)


def _per_layer(config, n_layers):
    """`per_layer_config` as {layer number: Config}; keys may be zero-padded ("05")."""
    section = config.section("per_layer_config", None)
    layers = {}
    for key in section if section else ():
        if not key.isdecimal() or int(key) >= n_layers or int(key) in layers:
            raise section.error(key, f"layer numbers 0..{n_layers - 1} as keys, each once")
        layer = layers[int(key)] = section.section(key)
        refuse_unknown(layer, ("head_dim", "num_key_value_heads"))
    return layers


def _ropes(section):
    """{kind: RopeSpec}. Sliding layers rotate every dimension, global ones the "proportional" quarter; a file that
    says so itself says all of it, because the class fills gaps with other values than these."""
    if section is None:
        return {SLIDING: RopeSpec(10_000.0), GLOBAL: RopeSpec(1_000_000.0, partial=0.25)}
    refuse_unknown(section, (SLIDING, GLOBAL))
    return {kind: _rope(section.section(kind)) for kind in (SLIDING, GLOBAL)}


def _rope(section):
    """{"rope_type": "default", "rope_theta"}, or {"rope_type": "proportional", "rope_theta", "partial_rotary_factor",
    "factor" (1 if absent)}."""
    refuse_unknown(section, ("rope_type", "rope_theta", "partial_rotary_factor", "factor"))
    is_default = section.str("rope_type", one_of=("default", "proportional")) == "default"
    partial = section.float("partial_rotary_factor", 1.0) if is_default else section.float("partial_rotary_factor")
    if partial > 1:
        raise section.error("partial_rotary_factor", "a number in (0, 1]")
    rope = RopeSpec(section.float("rope_theta"), section.float("factor", 1.0), partial)
    if is_default and (rope.factor, partial) != (1, 1):
        raise section.error("rope_type", "proportional, which alone takes a factor or a partial_rotary_factor")
    return rope
