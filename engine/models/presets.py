"""Shapes by name: the config.json of released models, as far as text and vision go.

Gemma 3: the technical report (arXiv:2503.19786) and the files of google/gemma-3-*; 4B leaves out whatever equals the
class default. Gemma 4: google/gemma-4-*; their drafts: sizes published second-hand, which agree with the published
numbers of parameters. Llama 4: meta-llama/Llama-4-*-Instruct.
"""

from engine.errors import ConfigError
from engine.models.gemma4_assistant import describe_assistant
from engine.models.registry import describe
from loaders.config import Config

SLIDING, GLOBAL = "sliding_attention", "full_attention"
GEMMA4_ROPE = {SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
               GLOBAL: {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25}}
E_SERIES = {"attention_k_eq_v": False, "num_global_key_value_heads": None, "hidden_size_per_layer_input": 256,
            "max_position_embeddings": 131072, "sliding_window": 512, "use_bidirectional_attention": None}


def _gemma3_text(**fields):
    return {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False,
            "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": [1, 106],
            "cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "max_position_embeddings": 32768,
            "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
            "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144, "num_attention_heads": 4,
            "num_key_value_heads": 1, **fields}


def _gemma3_multimodal(**fields):
    return {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 255999,
            "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
            "initializer_range": 0.02, "mm_tokens_per_image": 256, "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0",
            "text_config": {"model_type": "gemma3_text", "sliding_window": 1024,
                            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, **fields},
            "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
                              "model_type": "siglip_vision_model", "num_attention_heads": 16,
                              "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}}


def _gemma4_vision(**fields):
    return {"attention_bias": False, "attention_dropout": 0.0, "default_output_length": 280, "dtype": "bfloat16",
            "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "max_position_embeddings": 131072,
            "model_type": "gemma4_vision", "patch_size": 16, "pooling_kernel_size": 3, "position_embedding_size": 10240,
            "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}, **fields}


E_VISION = _gemma4_vision(hidden_size=768, intermediate_size=3072, num_hidden_layers=16, num_attention_heads=12,
                          num_key_value_heads=12, head_dim=64, standardize=False, use_clipped_linears=True)
LARGE_VISION = _gemma4_vision(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                              num_key_value_heads=16, head_dim=72, standardize=True, use_clipped_linears=False)
UNIFIED_VISION = {"mm_embed_dim": 3840, "mm_posemb_size": 1120, "model_patch_size": 48,
                  "model_type": "gemma4_unified_vision", "num_soft_tokens": 280, "output_proj_dims": 3840,
                  "patch_size": 16, "pooling_kernel_size": 3, "rms_norm_eps": 1e-06}


def _gemma4(architecture, model_type, n_layers, vision, **fields):
    return {"architectures": [architecture], "model_type": model_type, "audio_config": None, "audio_token_id": 258881,
            "boa_token_id": 256000, "boi_token_id": 255999, "dtype": "bfloat16", "eoa_token_index": 258883,
            "eoi_token_id": 258882, "eos_token_id": [1, 106], "image_token_id": 258880, "initializer_range": 0.02,
            "tie_word_embeddings": True, "video_token_id": 258884, "vision_config": vision,
            "text_config": {
                "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": True, "bos_token_id": 2,
                "dtype": "bfloat16", "enable_moe_block": False, "eos_token_id": 1, "final_logit_softcapping": 30.0,
                "global_head_dim": 512, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
                "hidden_size_per_layer_input": 0, "initializer_range": 0.02,
                "layer_types": ([SLIDING] * 5 + [GLOBAL]) * (n_layers // 6), "max_position_embeddings": 262144,
                "model_type": model_type + "_text", "moe_intermediate_size": None, "num_experts": None,
                "num_hidden_layers": n_layers, "num_kv_shared_layers": 0, "pad_token_id": 0, "rms_norm_eps": 1e-06,
                "rope_parameters": GEMMA4_ROPE, "sliding_window": 1024, "tie_word_embeddings": True,
                "top_k_experts": None, "use_bidirectional_attention": "vision", "use_cache": True,
                "use_double_wide_mlp": False, "vocab_size": 262144, "vocab_size_per_layer_input": 262144, **fields}}


def _llama4(**fields):
    return {"architectures": ["Llama4ForConditionalGeneration"], "boi_token_index": 200080, "eoi_token_index": 200081,
            "image_token_index": 200092, "model_type": "llama4", "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "transformers_version": "4.51.0.dev0",
            "text_config": {
                "attention_bias": False, "attention_chunk_size": 8192, "attention_dropout": 0.0, "attn_scale": 0.1,
                "attn_temperature_tuning": True, "bos_token_id": 200000, "eos_token_id": [200001, 200007, 200008],
                "floor_scale": 8192, "for_llm_compressor": False, "head_dim": 128, "hidden_act": "silu",
                "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 8192,
                "intermediate_size_mlp": 16384, "model_type": "llama4_text", "no_rope_layers": [],
                "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48,
                "num_key_value_heads": 8, "output_router_logits": False, "pad_token_id": 200018, "rms_norm_eps": 1e-05,
                "rope_theta": 500000.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
                "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 202048,
                **fields},
            "vision_config": {"hidden_size": 1408, "image_size": 336, "model_type": "llama4_vision_model"}}


PRESETS = {
    "gemma-3-270m": _gemma3_text(
        hidden_size=640, intermediate_size=2048, num_hidden_layers=18, _sliding_window_pattern=6,
        layer_types=([SLIDING] * 5 + [GLOBAL]) * 3, use_bidirectional_attention=False),
    "gemma-3-1b": _gemma3_text(
        hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, sliding_window_pattern=6),
    "gemma-3-4b": _gemma3_multimodal(
        hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
    "gemma-3-12b": _gemma3_multimodal(
        hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=8),
    "gemma-3-27b": _gemma3_multimodal(
        hidden_size=5376, intermediate_size=21504, num_hidden_layers=62, num_attention_heads=32, num_key_value_heads=16,
        head_dim=128, query_pre_attn_scalar=168),
    "gemma-4-e2b": _gemma4(
        "Gemma4ForConditionalGeneration", "gemma4", 35, E_VISION, hidden_size=1536, intermediate_size=6144,
        num_attention_heads=8, num_key_value_heads=1, layer_types=([SLIDING] * 4 + [GLOBAL]) * 7,
        use_double_wide_mlp=True, num_kv_shared_layers=20, **E_SERIES),
    "gemma-4-e4b": _gemma4(
        "Gemma4ForConditionalGeneration", "gemma4", 42, E_VISION, hidden_size=2560, intermediate_size=10240,
        num_attention_heads=8, num_key_value_heads=2, num_kv_shared_layers=18, **E_SERIES),
    "gemma-4-12b": _gemma4(
        "Gemma4UnifiedForConditionalGeneration", "gemma4_unified", 48, UNIFIED_VISION, hidden_size=3840,
        intermediate_size=15360, num_attention_heads=16, num_key_value_heads=8, num_global_key_value_heads=1),
    "gemma-4-26b-a4b": _gemma4(
        "Gemma4ForConditionalGeneration", "gemma4", 30, LARGE_VISION, hidden_size=2816, intermediate_size=2112,
        num_attention_heads=16, num_key_value_heads=8, num_global_key_value_heads=2, enable_moe_block=True,
        num_experts=128, top_k_experts=8, moe_intermediate_size=704),
    "gemma-4-31b": _gemma4(
        "Gemma4ForConditionalGeneration", "gemma4", 60, LARGE_VISION, hidden_size=5376, intermediate_size=21504,
        num_attention_heads=32, num_key_value_heads=16, num_global_key_value_heads=4),
    "llama-4-scout": _llama4(
        interleave_moe_layer_step=1, max_position_embeddings=10485760, num_local_experts=16, use_qk_norm=True,
        rope_scaling={"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                      "original_max_position_embeddings": 8192, "rope_type": "llama3"}),
    "llama-4-maverick": _llama4(
        interleave_moe_layer_step=2, max_position_embeddings=1048576, num_local_experts=128, use_qk_norm=False,
        rope_scaling=None),
}


def _assistant(backbone, n_heads, n_kv_heads, n_global_kv_heads, hidden, intermediate, window):
    """Small ones have a head of centroids, and targets whose K and V differ."""
    is_large = hidden > 256
    return {"architectures": ["Gemma4AssistantForCausalLM"], "model_type": "gemma4_assistant",
            "backbone_hidden_size": backbone, "use_ordered_embeddings": not is_large, "num_centroids": 2048,
            "centroid_intermediate_top_k": 32,
            "text_config": {
                "model_type": "gemma4_text", "hidden_size": hidden, "intermediate_size": intermediate,
                "num_hidden_layers": 4, "layer_types": [SLIDING] * 3 + [GLOBAL], "num_attention_heads": n_heads,
                "num_key_value_heads": n_kv_heads, "num_global_key_value_heads": n_global_kv_heads, "head_dim": 256,
                "global_head_dim": 512, "sliding_window": window, "attention_k_eq_v": is_large, "vocab_size": 262144,
                "num_kv_shared_layers": 4, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}


# The draft model that was released for a preset. What is public of 12B's does not say its sizes.
DRAFTS = {
    "gemma-4-e2b": _assistant(1536, 4, 1, None, 256, 2048, 512),
    "gemma-4-e4b": _assistant(2560, 4, 2, None, 256, 2048, 512),
    "gemma-4-26b-a4b": _assistant(2816, 16, 8, 2, 1024, 8192, 1024),
    "gemma-4-31b": _assistant(5376, 32, 16, 4, 1024, 8192, 1024),
}


def draft_preset(name, target=None):
    """The AssistantSpec of the draft released for a preset; target: the ModelSpec that it reads, the preset's, or its
    first layers. Raises ConfigError where none was, or where `target` lacks the layers that it reads."""
    if name not in DRAFTS:
        raise ConfigError(f"no draft model of {name!r} is known, expected one of {', '.join(DRAFTS)}")
    return describe_assistant(Config(DRAFTS[name], f"the draft of {name}"), target or preset(name))


def preset(name):
    """The ModelSpec of a released model. Raises ConfigError for a name that is none of PRESETS."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}, expected one of {', '.join(PRESETS)}")
    return describe(Config(PRESETS[name], name))
