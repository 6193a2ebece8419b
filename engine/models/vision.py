"""The vision part of a config.json: what encodes pictures, and the ids that stand for them in a prompt.

Source: Gemma 3 report section 2 and HF modeling_siglip; HF modeling_gemma4 and modeling_gemma4_unified.
"""

from math import isqrt

from engine.models.common import MOST_LAYERS, refuse_unknown
from engine.models.fields import COMMON, USED, Ignored, check_fields, ignored, only
from engine.models.vision_spec import BlockEmbedderSpec, Gemma4TowerSpec, MediaSpec, SiglipSpec

# What transformers writes into any section. The end of a text is no matter of pictures.
SECTION = {**COMMON, "eos_token_id": Ignored("the text part says it")}
SIGLIP_FIELDS = {
    **SECTION,
    "model_type": only("siglip_vision_model", otherwise="another tower"),
    **dict.fromkeys(["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
                     "patch_size", "layer_norm_eps"], USED),
    "hidden_act": only("gelu_pytorch_tanh", otherwise="another activation"),
    "num_channels": only(3, otherwise="pictures that are not RGB"),
    **ignored("soft tokens come from the states of all patches; no pooling head is read", "vision_use_head"),
}
GEMMA4_FIELDS = {
    **SECTION,
    "model_type": only("gemma4_vision", otherwise="another tower"),
    **dict.fromkeys(["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "patch_size", "pooling_kernel_size", "position_embedding_size",
                     "rms_norm_eps", "rope_parameters", "standardize", "use_clipped_linears"], USED),
    "hidden_activation": only("gelu_pytorch_tanh", otherwise="another activation"),
    "attention_bias": only(False, otherwise="projections with biases"),
    **ignored("inherited from the text part; every layer of the tower is alike and sees all patches", "layer_types",
              "global_head_dim", "max_position_embeddings", "use_bidirectional_attention"),
    **ignored("the request, or else the processor's file, says how many soft tokens", "default_output_length"),
}
UNIFIED_FIELDS = {
    **SECTION,
    "model_type": only("gemma4_unified_vision", otherwise="another embedder"),
    **dict.fromkeys(["patch_size", "pooling_kernel_size", "model_patch_size", "mm_embed_dim", "mm_posemb_size",
                     "rms_norm_eps"], USED),
    **ignored("the request, or else the processor's file, says how many soft tokens", "num_soft_tokens"),
    **ignored("soft tokens are as wide as the text part's states", "output_proj_dims"),
}


def siglip(config, n_soft):
    """SiglipSpec of Gemma 3's `vision_config`; n_soft is mm_tokens_per_image, a square number. Raises ConfigError. The
    sizes must be there: the class defaults are those of a model that no Gemma has."""
    check_fields(config, SIGLIP_FIELDS)
    hidden, patch, side = config.int("hidden_size"), config.int("patch_size"), config.int("image_size")
    unit = patch * isqrt(n_soft)
    if side % unit:
        raise config.error("image_size", f"a multiple of {unit}: patches of {patch} pixels times the root of {n_soft} "
                                         "mm_tokens_per_image")
    return SiglipSpec(hidden, config.int("intermediate_size"), _n_layers(config), _heads(config, hidden), patch, side,
                      n_soft, config.float("layer_norm_eps", 1e-6))


def gemma4_tower(config):
    """Gemma4TowerSpec of a `vision_config`. Raises ConfigError. Absent fields have the format's defaults, but for the
    sizes that no release leaves out."""
    check_fields(config, GEMMA4_FIELDS)
    n_heads, head_dim = config.int("num_attention_heads", 12), config.int("head_dim", 64)
    if config.int("num_key_value_heads", n_heads) != n_heads:
        raise config.error("num_key_value_heads", f"as many as the {n_heads} query heads")
    if head_dim % 4:
        raise config.error("head_dim", "a multiple of 4: pairs of dimensions turn by the column and by the row")
    return Gemma4TowerSpec(
        config.int("hidden_size"), config.int("intermediate_size"), _n_layers(config), n_heads, head_dim,
        patch=config.int("patch_size", 16), pool=config.int("pooling_kernel_size", 3),
        n_positions=config.int("position_embedding_size", 10240), norm_eps=config.float("rms_norm_eps", 1e-6),
        rope_theta=_theta(config.section("rope_parameters", None)), clipped=config.bool("use_clipped_linears", False),
        standardize=config.bool("standardize", False))


def block_embedder(config):
    """BlockEmbedderSpec of the 12B's `vision_config`. Raises ConfigError."""
    check_fields(config, UNIFIED_FIELDS)
    block = config.int("patch_size", 16) * config.int("pooling_kernel_size", 3)
    if config.int("model_patch_size", block) != block:
        raise config.error("model_patch_size", f"{block}, patch_size times pooling_kernel_size")
    return BlockEmbedderSpec(config.int("mm_embed_dim", 3840), block, config.int("mm_posemb_size", 1120),
                             soft_eps=config.float("rms_norm_eps", 1e-6))


def media(config, vocab, tower, *, image, begin, end, video=None, pad=0):
    """MediaSpec with the ids that `config` has.

    image, begin, end  ((key, other spelling, ...), the format's default)
    video              the key, or None; a file without it takes no videos, nor does one whose id is no id of the
                       vocabulary: transformers writes the released one into every file that does not say another
    Raises ConfigError for an id that is no id of the vocabulary, or that stands for two things.
    """
    ids = {}
    for what, (keys, default) in (("image_token", image), ("begin_image", begin), ("end_image", end)):
        given = [key for key in keys if key in config]
        key = given[0] if given else keys[0]
        ids[what] = _id(config, key, default, vocab, ids.values())
        for other in given[1:]:
            if config.int(other, least=0) != ids[what]:
                raise config.error(other, f"{ids[what]}, as {key} says")
    has_video = video is not None and video in config and config.int(video, least=0) < vocab
    return MediaSpec(tower, video_token=_id(config, video, None, vocab, ids.values()) if has_video else None, pad=pad,
                     **ids)


def _id(config, key, default, vocab, taken):
    token = config.int(key, default, least=0)
    if token >= vocab:
        raise config.error(key, f"an id of the vocabulary, below {vocab}" + ("" if key in config else
                                                                            f"; the default is {default}"))
    if token in taken:
        raise config.error(key, "an id of its own: another one for pictures is the same")
    return token


def _n_layers(config):
    n = config.int("num_hidden_layers")
    if n > MOST_LAYERS:
        raise config.error("num_hidden_layers", f"at most {MOST_LAYERS}")
    return n


def _heads(config, hidden):
    n_heads = config.int("num_attention_heads")
    if hidden % n_heads:
        raise config.error("num_attention_heads", f"a divisor of the hidden_size {hidden}")
    return n_heads


def _theta(section):
    """The base of the axial RoPE: {"rope_type": "default" | "axial", "rope_theta"}, maybe under full_attention."""
    if section is None:
        return 100.0
    if "full_attention" in section:
        refuse_unknown(section, ("full_attention",))
        section = section.section("full_attention")
    refuse_unknown(section, ("rope_type", "rope_theta"))
    section.str("rope_type", "axial", one_of=("default", "axial"))
    return section.float("rope_theta", 100.0)
