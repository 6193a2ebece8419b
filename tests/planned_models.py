"""Models that the engine does not run yet, as far as their cost depends on them.

Source: config.json of google/gemma-4-E2B, -E4B and -26B-A4B and of meta-llama/Llama-4-Scout-17B-16E.
"""

from dataclasses import replace

from engine.models import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, MoeSpec, RopeSpec

QUARTER = RopeSpec(1e6, partial=0.25)


def _model(name, hidden, layers, vocab=262144, tied=True, **fields):
    return ModelSpec(name, hidden, vocab, tuple(layers), norm_eps=1e-6, norm_offset=0.0, embed_scale=1.0,
                     logit_softcap=None, max_positions=131072, tied=tied, **fields)


def _gemma4(n_heads, n_kv_heads, window, n_global_kv_heads, v_is_k=False):
    sliding = AttentionSpec(n_heads, n_kv_heads, 256, 1.0, RopeSpec(1e4), window=window)
    return sliding, AttentionSpec(n_heads, n_global_kv_heads, 512, 1.0, QUARTER, v_is_k=v_is_k)


def _is_global(i, period):
    return (i + 1) % period == 0


def _e_series(name, hidden, n_layers, period, n_shared, attentions, intermediate, shared_intermediate):
    """The last n_shared layers read the K and V of the last layer of their kind before them."""
    first = n_layers - n_shared
    last = {_is_global(i, period): i for i in range(first)}
    own = [LayerSpec(attentions[_is_global(i, period)], DenseSpec(intermediate)) for i in range(first)]
    shared = [LayerSpec(attentions[_is_global(i, period)], DenseSpec(shared_intermediate),
                        kv_from=last[_is_global(i, period)]) for i in range(first, n_layers)]
    return _model(name, hidden, own + shared, per_layer_input=256)


def _gemma4_26b_a4b():
    attentions = _gemma4(16, 8, 1024, 2, v_is_k=True)
    moe = MoeSpec(n_experts=128, experts_per_token=8, intermediate=704, dense=DenseSpec(2112))
    return _model("gemma4", 2816, [LayerSpec(attentions[_is_global(i, 6)], moe) for i in range(30)])


def _llama4_scout():
    everything = AttentionSpec(40, 8, 128, 128**-0.5, RopeSpec(5e5, interleaved=True))
    chunked = replace(everything, chunk=8192)
    moe = MoeSpec(n_experts=16, experts_per_token=1, intermediate=8192, dense=DenseSpec(8192))
    return _model("llama4", 5120, [LayerSpec(everything if _is_global(i, 4) else chunked, moe) for i in range(48)],
                  vocab=202048, tied=False)


PLANNED = {
    "gemma-4-26b-a4b": _gemma4_26b_a4b(),
    "gemma-4-e4b": _e_series("gemma4", 2560, 42, 6, 18, _gemma4(8, 2, 512, 2), 10240, 10240),
    "gemma-4-e2b": _e_series("gemma4", 1536, 35, 5, 20, _gemma4(8, 1, 512, 1), 6144, 12288),
    "llama-4-scout": _llama4_scout(),
}
