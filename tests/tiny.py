"""Tiny random checkpoints of every supported architecture, written as Hugging Face directories.

    config = tiny.flat("gemma4", num_hidden_layers=8)
    llm = LLM(tiny.write_checkpoint(tmp_path, config), device="cpu")
"""

import json

import numpy as np
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from engine.models import describe
from engine.tensors import EMBED, HEADS, PER_LAYER_EMBED, media_targets, targets
from engine.vision_tensors import BOUNDS, spelled
from loaders.config import Config

# Every size differs from the others where it can, windows and chunks are shorter than any prompt worth running, and
# each kind of layer comes twice where it can.
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "max_position_embeddings": 128,
         "eos_token_id": 1}
FLAT = {
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **SIZES, "sliding_window": 5,
        "num_hidden_layers": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma4": {
        "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", **SIZES, "sliding_window": 5,
        "num_hidden_layers": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}}},
}
FLAT["gemma4-moe"] = {**FLAT["gemma4"], "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2,
                      "moe_intermediate_size": 12}
# Layers 3 to 5 read the K and V of layers 1 and 2.
FLAT["gemma4-e"] = {**FLAT["gemma4"], "attention_k_eq_v": False, "num_global_key_value_heads": None,
                    "num_kv_shared_layers": 3, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 8,
                    "vocab_size_per_layer_input": 112}
# No RoPE on layer 3, experts in layers 1, 3 and 5.
FLAT["llama4"] = {
    "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", **SIZES, "num_hidden_layers": 6,
    "rms_norm_eps": 1e-5, "no_rope_layers": [], "attention_chunk_size": 8, "floor_scale": 5, "attn_scale": 0.3,
    "interleave_moe_layer_step": 2, "intermediate_size": 24, "intermediate_size_mlp": 40,
    "num_local_experts": 8, "num_experts_per_tok": 1, "rope_theta": 5e5, "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
                     "original_max_position_embeddings": 64}}
FAMILIES = tuple(FLAT)
NESTED = {
    "gemma3": {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
    "gemma4": {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4"},
    "llama4": {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4"},
}
# Vision parts. Gemma 4 has positions for a picture of 70 soft tokens in a row.
VISION = {
    "gemma3": {"model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2,
               "num_attention_heads": 2, "image_size": 24, "patch_size": 4, "vision_use_head": False},
    "gemma4": {"model_type": "gemma4_vision", "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2,
               "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 2,
               "pooling_kernel_size": 3, "position_embedding_size": 210, "standardize": True,
               "use_clipped_linears": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "unified": {"model_type": "gemma4_unified_vision", "mm_embed_dim": 24, "mm_posemb_size": 70, "patch_size": 2,
                "pooling_kernel_size": 3},
}
AUDIO_TOKEN = 58
IDS = {"gemma3": {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 9},
       "gemma4": {"image_token_id": 60, "video_token_id": 59, "boi_token_id": 61, "eoi_token_id": 62}}


def flat(family, **fields):
    """The config.json of a text-only checkpoint of one of FAMILIES, as a dict, with `fields` changed."""
    return {**FLAT[family], **fields}


def nested(family, **fields):
    """The config.json of a multimodal checkpoint, its vision part left out; `fields` change the text section."""
    text = flat(family, **fields)
    del text["architectures"]
    return {**NESTED[family.partition("-")[0]], "text_config": text}


def draft(family, **fields):
    """The config.json of a draft model, with a head of 8 centroids, for the target flat(family), as a dict; `fields`
    change the text section."""
    target = flat(family)
    text = {key: value for key, value in target.items()
            if key not in ("architectures", "enable_moe_block", "num_experts", "top_k_experts", "moe_intermediate_size",
                           "use_double_wide_mlp", "vocab_size_per_layer_input", "final_logit_softcapping")}
    text |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_kv_shared_layers": 3,
             "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
             "hidden_size_per_layer_input": 0, **fields}
    return {"architectures": ["Gemma4AssistantForCausalLM"], "model_type": "gemma4_assistant",
            "backbone_hidden_size": target["hidden_size"], "use_ordered_embeddings": True, "num_centroids": 8,
            "centroid_intermediate_top_k": 3, "text_config": text}


def seeing(family, vision=None, **fields):
    """The config.json of a checkpoint that takes pictures: one of FAMILIES, or "unified"; `vision` changes its vision
    section, `fields` the text section."""
    kind = family.partition("-")[0]
    base = "gemma4" if kind == "unified" else kind
    config = {**nested("gemma4" if kind == "unified" else family, **fields), **IDS[base],
              "vision_config": {**VISION[kind], **(vision or {})}}
    if kind == "unified":
        config |= {"architectures": ["Gemma4UnifiedForConditionalGeneration"], "model_type": "gemma4_unified"}
        config["text_config"]["model_type"] = "gemma4_unified_text"
    if base == "gemma4":
        config["audio_token_id"] = AUDIO_TOKEN
    return config


def vision_tensors(config, seed=0):
    """{checkpoint name: float32 array} of a vision part, named as in released files, exact in bfloat16."""
    spec, prefixes = describe(Config(config)), spelled(())
    rng = np.random.default_rng([seed, 1])
    tensors = {}
    for target in media_targets(spec):
        for name, shape in target.parts:
            values = rng.standard_normal(shape)
            begin, dot, rest = name.partition(".")
            if name.endswith(BOUNDS):                       # some values are beyond them
                values = (-1 if name.endswith("_min") else 1) * (1.5 + 0.1 * abs(values))
            elif len(shape) == 1 and not name.endswith("bias"):
                values = 1 + 0.2 * values - (spec.norm_offset if target.is_norm else 0)
            elif len(shape) == 1 or target.name == "positions":
                values *= 0.2
            else:
                values /= (values.size / len(values)) ** 0.5
            tensors[prefixes[begin + dot] + rest] = np.asarray(values).astype(bfloat16).astype(np.float32)
    return tensors


def random_tensors(config, seed=0):
    """{checkpoint name without prefix: float32 array} of all that the config asks for, exact in bfloat16. Where the
    embedding is not tied, `lm_head.weight` is among them."""
    spec = describe(Config(config))
    rng = np.random.default_rng(seed)
    tensors = {}
    for target in targets(spec, untied_head=not spec.tied):
        for name, shape in target.parts:
            values = rng.standard_normal(shape)
            if len(shape) == 1:                             # norms around 1, and the scalar of a layer
                values = 1 + 0.2 * values - (spec.norm_offset if target.is_norm else 0)
            elif name in (EMBED, HEADS[0]):
                values *= 0.2                               # small, so that the layers decide what comes next
            elif name == PER_LAYER_EMBED:
                values *= 0.2
            else:
                values /= target.n_in ** 0.5
            tensors[name] = values.astype(bfloat16).astype(np.float32)
    return tensors


def write_checkpoint(directory, config, tensors=None, *, seed=0, prefix="model.", head=HEADS[0], dtype=bfloat16,
                     n_shards=1, vision=None, extra=None):
    """Writes config.json and the tensors under `directory`, which is made; returns it.

    tensors   {name without prefix: array}; None takes random_tensors(config, seed)
    prefix    put before every name but the head's, which is `head`
    dtype     of the file: bfloat16, float16 or float32
    n_shards  1 writes model.safetensors, more write that many files and an index
    vision    {whole name: array} of the vision part; None takes vision_tensors(config, seed) where the config has one
    extra     {whole name: array} written beside them, in its own dtype
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config, seed) if tensors is None else tensors
    named = {head if name == HEADS[0] else prefix + name: values.astype(dtype) for name, values in tensors.items()}
    if vision is None:
        vision = vision_tensors(config, seed) if config.get("vision_config") else {}
    named.update({name: values.astype(dtype) for name, values in vision.items()})
    named.update(extra or {})
    if n_shards == 1:
        save_file(named, directory / "model.safetensors")
        return directory
    weight_map = {name: f"model-{i % n_shards + 1:05}-of-{n_shards:05}.safetensors" for i, name in enumerate(named)}
    for file in set(weight_map.values()):
        save_file({name: values for name, values in named.items() if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory
