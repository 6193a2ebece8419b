"""Watching the ops of a step: an op table that says what it runs."""

from functools import wraps
from types import SimpleNamespace

OPS = ("accept_drafts", "add_bias", "add_norm", "add_norms", "add_rows", "apply_edits", "attention",
       "attention_temperature", "candidate_argmax", "candidate_logits", "clamp", "embed", "gate_per_layer",
       "gated_linear", "layer_norm", "linear", "logit_softcap", "mix_per_layer", "moe_combine", "moe_gated_linear",
       "moe_linear", "moe_route", "pick_centroids", "place_rows", "pool_rows", "qk_norm_rope_cache", "relax_drafts",
       "rms_norm", "rope_angles", "router_norm", "sample", "sample_drafts", "sample_with_drafts", "scale_rows",
       "select_rows", "top_logprobs")


def traced(ops, around):
    """The op table `ops` with every op run inside around(name, args, kwargs), a context; the rest passes through.

    While a CUDA graph is captured ops run as always, and when it is replayed they do not: a trace wants graphs=False.
    """
    table = {name: getattr(ops, name) for name in dir(ops) if not name.startswith("_")}
    return SimpleNamespace(**{**table, **{name: _traced(name, table[name], around) for name in OPS}})


def _traced(name, op, around):
    @wraps(op)
    def run(*args, **kwargs):
        with around(name, args, kwargs):
            return op(*args, **kwargs)
    return run
