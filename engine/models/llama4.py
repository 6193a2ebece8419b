"""Llama 4 text decoder: chunked layers with interleaved RoPE, every fourth without positions, routed experts beside a
shared one.

Source: Llama 4 model cards; HF modeling_llama4. Norms only before attention and MLP; weights multiply directly, after
a rounding.
"""

import math

from engine.models.common import experts_per_token, head_dim, is_tied, kv_heads, n_layers, refuse_unknown
from engine.models.fields import COMMON, USED, Ignored, check_fields, ignored, only
from engine.models.spec import (
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    Llama3Scaling,
    ModelSpec,
    MoeSpec,
    RopeSpec,
    TemperatureSpec,
)

CHUNKED, GLOBAL = "chunked_attention", "full_attention"

TEXT_FIELDS = {
    **COMMON,
    "model_type": only("llama4_text", otherwise="another model"),
    **dict.fromkeys(["vocab_size", "hidden_size", "intermediate_size", "intermediate_size_mlp", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "head_dim", "num_local_experts",
                     "num_experts_per_tok", "interleave_moe_layer_step", "moe_layers", "no_rope_layers",
                     "no_rope_layer_interval", "layer_types", "attention_chunk_size", "use_qk_norm",
                     "attn_temperature_tuning", "floor_scale", "attn_scale", "attention_multiplier", "rope_theta",
                     "rope_scaling", "rope_parameters", "rms_norm_eps", "max_position_embeddings",
                     "tie_word_embeddings"], USED),
    "hidden_act": only("silu", otherwise="another activation"),
    "attention_bias": only(False, otherwise="projections with biases"),
    "norm_dtype": only("bfloat16", otherwise="norms in another dtype than the released one"),
    **ignored("training only", "router_aux_loss_coef", "router_jitter_noise"),
    "output_router_logits": Ignored("what transformers returns, not what it computes"),
    "for_llm_compressor": Ignored("how transformers lays experts out while it quantises them"),
}

MULTIMODAL_FIELDS = {
    **COMMON,
    "model_type": only("llama4", otherwise="another model"),
    "text_config": USED,
    "tie_word_embeddings": USED,
    **ignored("the vision tower does not run yet; text prompts do not need it", "vision_config", "boi_token_index",
              "eoi_token_index", "image_token_index", "boi_token_id", "eoi_token_id", "image_token_id"),
}

UNUSED_IN_TEXT = ("vision_model.", "multi_modal_projector.", "model.vision_model.", "model.multi_modal_projector.")


def describe_text(config):
    """ModelSpec of Llama4ForCausalLM. `config` is the flat loaders Config. Raises ConfigError."""
    return _describe(config, tied=config.bool("tie_word_embeddings", False), eos_ids=config.ids("eos_token_id"))


def describe_multimodal(config):
    """ModelSpec of the text part of Llama4ForConditionalGeneration, whose text fields sit in `text_config`."""
    check_fields(config, MULTIMODAL_FIELDS)
    text = config.section("text_config")
    return _describe(text, tied=is_tied(config, text, default=False), unused=UNUSED_IN_TEXT,
                     eos_ids=config.ids("eos_token_id") or text.ids("eos_token_id"))


def _describe(config, *, tied, eos_ids, unused=()):
    # Defaults are those of the file format, which are Scout's. No release leaves out the three sizes without one.
    check_fields(config, TEXT_FIELDS)
    with_rope = _with_rope(config)
    attentions, with_experts = _attentions(config), _with_experts(config, len(with_rope))
    moe = _moe(config) if any(with_experts) else None
    dense = DenseSpec(config.int("intermediate_size_mlp", 16384), "silu")
    return ModelSpec(
        architecture="llama4", hidden=config.int("hidden_size"), vocab=config.int("vocab_size", 202048),
        layers=tuple(LayerSpec(attentions[rope], moe if experts else dense, sandwich=False)
                     for rope, experts in zip(with_rope, with_experts, strict=True)),
        norm_eps=config.float("rms_norm_eps", 1e-5), norm_offset=0.0, embed_scale=1.0, logit_softcap=None,
        max_positions=config.int("max_position_embeddings", 131072), tied=tied, eos_ids=eos_ids,
        unused_prefixes=unused, norm_rounds_first=True)


def _with_rope(config):
    """For each layer, whether it has RoPE and sees its own chunk only; the others see everything and no positions.

    `no_rope_layers` holds a 1 for a layer *with* RoPE, and where it is absent or empty every so many-th has none."""
    n, interval = n_layers(config), config.int("no_rope_layer_interval", 4)
    listed = config.list("no_rope_layers", [])
    if listed and (len(listed) != n or any(type(flag) is not int or flag not in (0, 1) for flag in listed)):
        raise config.error("no_rope_layers", f"a list of {n} from 0, 1 (1 is a layer with RoPE), or an empty one")
    with_rope = [bool(flag) for flag in listed] or [(i + 1) % interval != 0 for i in range(n)]
    kinds = [CHUNKED if rope else GLOBAL for rope in with_rope]
    if config.list("layer_types", kinds, length=n, one_of=(CHUNKED, GLOBAL)) != kinds:
        raise config.error("layer_types", f"{CHUNKED} for the layers with RoPE, by no_rope_layers, and {GLOBAL} for "
                                          "the others")
    return with_rope


def _attentions(config):
    """{with RoPE: AttentionSpec}"""
    hidden, n_heads = config.int("hidden_size"), config.int("num_attention_heads", 40)
    # A null is not an absent key here: the format says what it derives the number from.
    n_kv_heads = kv_heads(config, "num_key_value_heads", n_heads, _absent(config, "num_key_value_heads", 8, n_heads))
    dim = head_dim(config, "head_dim", _absent(config, "head_dim", 128, hidden // n_heads))
    scale = dim**-0.5
    if not math.isclose(config.float("attention_multiplier", scale), scale, rel_tol=1e-6):
        raise config.error("attention_multiplier", f"{scale}, the head_dim of {dim} ** -0.5: implementations differ on "
                                                   "whether another one counts")
    chunk = config.int("attention_chunk_size", _absent(config, "attention_chunk_size", 8192, None))
    if chunk is None:
        raise config.error("attention_chunk_size", "an int >= 1, or no such key, which means 8192")
    return {True: AttentionSpec(n_heads, n_kv_heads, dim, scale, _rope(config), chunk=chunk,
                                qk_norm="plain" if config.bool("use_qk_norm", True) else None),
            False: AttentionSpec(n_heads, n_kv_heads, dim, scale, None, qk_norm=None,
                                 temperature=_temperature(config))}


def _absent(config, key, if_absent, if_null):
    return if_null if key in config.values else if_absent


def _temperature(config):
    """The TemperatureSpec of layers without RoPE, or None. Released files turn it on with true, or with a 4."""
    temperature = TemperatureSpec(config.float("attn_scale", 0.1), config.int("floor_scale", 8192))
    key = "attn_temperature_tuning"
    is_on = config.values.get(key)
    if is_on is not None and type(is_on) not in (bool, int):
        raise config.error(key, "true, false or an int, of which 0 is false")
    return temperature if is_on or key not in config else None


def _with_experts(config, n):
    """For each of n layers, whether it has experts: those listed, else every so many-th."""
    step = config.int("interleave_moe_layer_step", 1)
    listed = config.list("moe_layers", list(range(step - 1, n, step)))
    if any(type(i) is not int or not 0 <= i < n for i in listed) or len(set(listed)) < len(listed):
        raise config.error("moe_layers", f"a list of layer numbers 0..{n - 1}, each once")
    return [i in listed for i in range(n)]


def _moe(config):
    n_experts, width = config.int("num_local_experts", 16), config.int("intermediate_size")
    return MoeSpec(n_experts, experts_per_token(config, "num_experts_per_tok", n_experts, 1), width,
                   DenseSpec(width, "silu"), routing="sigmoid", activation="silu", in_out=True)


def _rope(config):
    """The RopeSpec from `rope_theta` and `rope_scaling`, or from `rope_parameters`, which has both inside. A file that
    has both spellings must say the same twice."""
    base = config.float("rope_theta", 500_000.0)
    flat, nested = config.section("rope_scaling", None), config.section("rope_parameters", None)
    rope = _scaled(nested if nested is not None else flat, base)
    if nested is not None:
        if flat is not None and _scaled(flat, rope.theta) != rope:
            raise config.error("rope_scaling", "the same scaling as rope_parameters")
        if "rope_theta" in config and base != rope.theta:
            raise config.error("rope_theta", f"the {rope.theta} of rope_parameters")
    return rope


def _scaled(section, base):
    """{"rope_type" or "type": "default" | "llama3", "rope_theta", and the four numbers of "llama3"}, or None."""
    if section is None:
        return RopeSpec(base, interleaved=True)
    numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    refuse_unknown(section, ("rope_type", "type", "rope_theta", *numbers))
    kind_key = "rope_type" if "rope_type" in section else "type"
    theta = section.float("rope_theta", base)
    if section.str(kind_key, "default", one_of=("default", "llama3")) == "default":
        surplus = [key for key in numbers if key in section]
        if surplus:
            raise section.error(surplus[0], "no such field, or rope_type llama3")
        return RopeSpec(theta, interleaved=True)
    low, high = section.float("low_freq_factor"), section.float("high_freq_factor")
    if high < low:
        raise section.error("high_freq_factor", f"at least the low_freq_factor of {low}")
    return RopeSpec(theta, section.float("factor"), interleaved=True, llama3=Llama3Scaling(
        low, high, section.int("original_max_position_embeddings")))
