"""The ops of a vision tower at the shapes of one picture, of the middle one of its budgets."""

from engine.models.vision_spec import BlockEmbedderSpec, SiglipSpec


def tower_shapes(tower, hidden, most_patches):
    """(op, label, sizes) of everything that a picture runs on its way to soft tokens of a decoder's `hidden`; of fewer
    soft tokens than the budget's where their patches would be more than most_patches."""
    k = tower.pool_side**2
    n_soft = max(1, min(tower.budgets[len(tower.budgets) // 2], most_patches // k))
    n = n_soft * k
    n_axes = 1 if isinstance(tower, SiglipSpec) else 2
    yield _product("patch", n, tower.patch_width, tower.hidden)
    yield "add_rows", "", {"n_tokens": n, "hidden": tower.hidden, "n_axes": n_axes,
                           "n_places": tower.n_positions * n_axes}
    if isinstance(tower, BlockEmbedderSpec):
        yield "layer_norm", "patch", {"n_tokens": n, "hidden": tower.patch_width}
        yield "layer_norm", "", {"n_tokens": n, "hidden": tower.hidden}
        yield _bias("", n, tower.hidden)
    else:
        yield from _attention(tower, n)
        yield from (_siglip if isinstance(tower, SiglipSpec) else _gemma4)(tower, n)
        yield "pool_rows", "", {"n_tokens": n_soft, "hidden": tower.hidden, "k": k,
                                "standardize": getattr(tower, "standardize", False)}
    yield "rms_norm", "tower", {"n_tokens": n_soft, "hidden": tower.hidden}
    yield _product("projection", n_soft, tower.hidden, hidden)
    yield "place_rows", "", {"n_tokens": n_soft, "width": hidden}


def _attention(tower, n):
    is_siglip = isinstance(tower, SiglipSpec)
    heads = {"n_heads": tower.n_heads, "n_kv_heads": tower.n_heads, "head_dim": tower.head_dim}
    yield "qk_norm_rope_cache", "tower", {
        "n_tokens": n, **heads, "n_pairs": None if is_siglip else tower.head_dim // 2, "v_norm": not is_siglip,
        "v_is_k": False, "interleaved": False, "qk_norm": None if is_siglip else "weighted", "has_temperature": False,
        "has_kv": True}
    yield "attention", "tower", {"rows": [(1, n, n)], **heads, "window": None, "chunk": None, "sees_all": True}
    yield _product("o", n, tower.q_width, tower.hidden)


def _siglip(tower, n):
    yield "layer_norm", "", {"n_tokens": n, "hidden": tower.hidden}
    yield _product("qkv", n, tower.hidden, 3 * tower.q_width)
    yield _bias("qkv", n, 3 * tower.q_width)
    yield _product("fc1", n, tower.hidden, tower.intermediate)
    yield _bias("fc1", n, tower.intermediate, activation="gelu_tanh")
    yield _product("fc2", n, tower.intermediate, tower.hidden)
    yield _bias("fc2", n, tower.hidden, residual=True)


def _gemma4(tower, n):
    yield "rope_angles", "tower", {"n_tokens": n, "n_pairs": tower.head_dim // 2, "n_axes": 2}
    yield "rms_norm", "tower", {"n_tokens": n, "hidden": tower.hidden}
    yield "add_norm", "tower", {"n_tokens": n, "hidden": tower.hidden, "layer_scalar": False}
    yield _product("down", n, tower.intermediate, tower.hidden)
    if not tower.clipped:
        yield _product("qkv", n, tower.hidden, 3 * tower.q_width)
        yield "gated_linear", "tower", {"n_tokens": n, "n_in": tower.hidden, "intermediate": tower.intermediate,
                                        "activation": "gelu_tanh"}
        return
    for label, n_out in (("q", tower.q_width), ("gate", tower.intermediate)):
        yield _product(label, n, tower.hidden, n_out)
    yield "gate_per_layer", "tower", {"n_tokens": n, "n_layers": 1, "width": tower.intermediate}
    for label, width, n_columns in (("input", tower.hidden, tower.hidden), ("q", tower.q_width, 3 * tower.q_width),
                                    ("gate", tower.intermediate, tower.intermediate)):
        yield "clamp", label, {"n_tokens": n, "width": width, "n_columns": n_columns}


def _product(label, n, n_in, n_out):
    return "linear", f"tower {label}", {"n_tokens": n, "n_in": n_in, "n_out": n_out}


def _bias(label, n, width, activation=None, residual=False):
    return "add_bias", label, {"n_tokens": n, "width": width, "activation": activation, "residual": residual}
