"""The cost model: the least that an op or a step of a model costs, in bytes, operations and, given two ceilings, time.

`linear(...)` and its like answer for the op of that name in the op table, `of(name, args, kwargs)` for any of them;
`floor(spec, rows)` for a step of a ModelSpec. What a Cost is stands in roofline.py.
"""

from engine.floor import (
    break_even,
    draft_step,
    experts,
    floor,
    floor_parts,
    launch_share,
    n_matrix_weights,
    speculation_ceiling,
    visible,
)
from engine.op_cost import (
    accept_drafts,
    add_bias,
    add_norm,
    add_norms,
    add_rows,
    apply_edits,
    attention,
    attention_temperature,
    candidate_argmax,
    candidate_logits,
    clamp,
    embed,
    gate_per_layer,
    gated_linear,
    layer_norm,
    linear,
    logit_softcap,
    mix_per_layer,
    moe_combine,
    moe_gated_linear,
    moe_linear,
    moe_route,
    pick_centroids,
    place_rows,
    pool_rows,
    qk_norm_rope_cache,
    relax_drafts,
    rms_norm,
    rope_angles,
    router_norm,
    sample,
    sample_drafts,
    sample_with_drafts,
    scale_rows,
    select_rows,
    top_logprobs,
)
from engine.roofline import Ceilings, Cost

__all__ = ["OPS", "Ceilings", "Cost", "accept_drafts", "add_bias", "add_norm", "add_norms", "add_rows", "apply_edits",
           "attention", "attention_temperature", "break_even", "candidate_argmax", "candidate_logits", "clamp",
           "draft_step", "embed", "experts", "floor", "floor_parts", "gate_per_layer", "gated_linear", "launch_share",
           "layer_norm", "linear", "logit_softcap", "mix_per_layer", "moe_combine", "moe_gated_linear", "moe_linear",
           "moe_route", "n_matrix_weights", "of", "pick_centroids", "place_rows", "pool_rows", "qk_norm_rope_cache",
           "relax_drafts", "rms_norm", "rope_angles", "router_norm", "sample", "sample_drafts", "sample_with_drafts",
           "scale_rows", "select_rows", "speculation_ceiling", "top_logprobs", "visible"]

OPS = {op.__name__: op for op in (accept_drafts, add_bias, add_norm, add_norms, add_rows, apply_edits, attention,
                                  attention_temperature, candidate_argmax, candidate_logits, clamp, embed,
                                  gate_per_layer, gated_linear, layer_norm, linear, logit_softcap, mix_per_layer,
                                  moe_combine, moe_gated_linear, moe_linear, moe_route, pick_centroids, place_rows,
                                  pool_rows, qk_norm_rope_cache, relax_drafts, rms_norm, rope_angles, router_norm,
                                  sample, sample_drafts, sample_with_drafts, scale_rows, select_rows, top_logprobs)}


def of(op_name, args, kwargs=None):
    """The Cost of ops.<op_name>(*args, **kwargs). Raises ValueError for a name that is no op."""
    if op_name not in OPS:
        raise ValueError(f"no cost of an op {op_name!r}, expected one of {', '.join(OPS)}")
    return OPS[op_name](*args, **(kwargs or {}))
