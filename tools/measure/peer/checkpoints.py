"""The models of against --lane cpu --peer transformers: released configs at sizes that a small machine runs, and what
their random weights weigh in float32."""

from math import prod

from engine.kv_cache import pool_specs
from engine.models import describe
from engine.models.presets import GLOBAL, PRESETS, SLIDING
from engine.tensors import n_weights, targets
from loaders.config import Config
from measure.models import Model

F32_BYTES = 4
TABLES = ("embed", "per_layer_embed")       # of which a token reads a row
NOT_FOR_PEERS = ("cache_implementation",)   # what else would choose transformers' KV cache


def shape(name, preset, architecture, **sizes):
    """A Model: the text part of a released config as a text-only checkpoint of that architecture, other `sizes`."""
    released = PRESETS[preset]
    config = {"architectures": [architecture], **released.get("text_config", released), **sizes}
    config = {key: value for key, value in config.items() if key not in NOT_FOR_PEERS}
    return Model(name, describe(Config(config, name)), None, config)


def _gemma3(name, hidden, n_layers, n_heads, n_kv_heads, head_dim, intermediate, vocab, window=512, pattern=6):
    kinds = [GLOBAL if i % pattern == pattern - 1 else SLIDING for i in range(n_layers)]
    return shape(name, "gemma-3-270m", "Gemma3ForCausalLM", hidden_size=hidden, num_hidden_layers=n_layers,
                 num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, head_dim=head_dim,
                 query_pre_attn_scalar=head_dim, intermediate_size=intermediate, vocab_size=vocab,
                 sliding_window=window, _sliding_window_pattern=pattern, layer_types=kinds)


def _gemma4(name, preset, kinds, hidden, n_heads, n_kv_heads, head_dim, intermediate, vocab, **sizes):
    return shape(name, preset, "Gemma4ForCausalLM", hidden_size=hidden, num_hidden_layers=len(kinds),
                 layer_types=kinds, num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, head_dim=head_dim,
                 global_head_dim=2 * head_dim, intermediate_size=intermediate, vocab_size=vocab,
                 vocab_size_per_layer_input=vocab, sliding_window=512, **sizes)


def _gemma4_moe(name, *sizes, n_experts, n_chosen, width):
    return _gemma4(name, "gemma-4-26b-a4b", [*[SLIDING] * 5, GLOBAL], *sizes, num_global_key_value_heads=1,
                   num_experts=n_experts, top_k_experts=n_chosen, moe_intermediate_size=width)


def _gemma4_e(name, *sizes, per_layer):
    return _gemma4(name, "gemma-4-e2b", [*[SLIDING] * 4, GLOBAL] * 2, *sizes, num_kv_shared_layers=5,
                   hidden_size_per_layer_input=per_layer)


def _llama4(name, hidden, n_heads, n_kv_heads, head_dim, intermediate, vocab, n_experts, chunk=256):
    return shape(name, "llama-4-scout", "Llama4ForCausalLM", hidden_size=hidden, num_hidden_layers=8,
                 num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, head_dim=head_dim,
                 intermediate_size=intermediate, intermediate_size_mlp=2 * intermediate, vocab_size=vocab,
                 num_local_experts=n_experts, attention_chunk_size=chunk, floor_scale=chunk, bos_token_id=2,
                 eos_token_id=[1], pad_token_id=0)


# Sizes in order: hidden, (layers of Gemma 3), query heads, KV heads, head_dim, intermediate, vocabulary
SHAPES = {model.name: model for model in (
    _gemma3("tiny", 64, 6, 4, 1, 32, 256, 4096),
    _gemma3("small", 256, 6, 4, 2, 64, 1024, 8192),
    _gemma3("270m", 640, 18, 4, 1, 256, 2048, 262144),          # gemma-3-270m's
    _gemma4_moe("gemma4-moe-tiny", 64, 4, 2, 32, 64, 4096, n_experts=16, n_chosen=4, width=32),
    _gemma4_moe("gemma4-moe-small", 256, 4, 2, 64, 192, 8192, n_experts=64, n_chosen=8, width=128),
    _gemma4_e("gemma4-e-tiny", 64, 4, 1, 32, 128, 4096, per_layer=16),
    _gemma4_e("gemma4-e-small", 256, 4, 1, 64, 1024, 8192, per_layer=64),
    _llama4("llama4-tiny", 64, 4, 1, 32, 128, 4096, n_experts=8),
    _llama4("llama4-small", 256, 4, 2, 64, 512, 8192, n_experts=16),
)}


def matrices(spec):
    """The [out, in] matrices that one decoded token multiplies by: every linear layer, its experts and the head, each
    once."""
    found = []
    for target in targets(spec, untied_head=not spec.tied):
        if target.name in TABLES and not (target.name == "embed" and spec.tied):
            continue
        for _, dims in target.parts:
            if len(dims) == 2:
                found.append(dims)
            elif len(dims) == 3:                                # of each expert, of which a token meets a few
                layer = spec.layers[int(target.name.split(".")[1])]
                found += [dims[:0:-1] if target.in_out else dims[1:]] * layer.moe.experts_per_token
    return found


def weight_bytes(spec):
    """Bytes of all weights in float32."""
    return F32_BYTES * n_weights(spec)


def token_bytes(spec):
    """Bytes of float32 weights that one decoded token reads."""
    return F32_BYTES * sum(map(prod, matrices(spec)))


def kv_bytes(spec, n_tokens):
    """Bytes of float32 keys and values that n_tokens of one sequence need; a local layer keeps a window or a chunk."""
    return sum(pool.token_bytes(F32_BYTES) * min(n_tokens, pool.window or pool.chunk or n_tokens)
               for pool in pool_specs(spec))
