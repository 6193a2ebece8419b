"""Which arrays a model needs, and which tensors of a checkpoint fill them; every tensor of the file accounted for.

Beside engine/vision_tensors.py the only file that knows how checkpoints spell their tensors.
"""

import difflib
from dataclasses import dataclass
from math import prod

from engine.errors import CheckpointError
from engine.target import Target
from engine.vision_tensors import is_pooling_head, is_vision, spelled, vision_targets

# Released multimodal files, what recent transformers calls them in memory and saves, and text-only files.
PREFIXES = ("language_model.model.", "model.language_model.", "model.")
HEADS = ("lm_head.weight", "language_model.lm_head.weight")
EMBED = "embed_tokens.weight"
PER_LAYER_EMBED = "embed_tokens_per_layer.weight"
# Of a draft model: its columns are two arrays, for the embedding and for the states; and whole numbers.
PRE_PROJECTION, TOKEN_ORDERING = "pre_projection.weight", "masked_embedding.token_ordering"
N_HINTS = 5         # problems of a kind that are told with the nearest name


def targets(spec, untied_head=False, ple="device"):
    """Every array that the text part of a ModelSpec needs, with the checkpoint tensors (prefix stripped) that fill it.
    With ple="host" the table of per-layer inputs is none."""
    hidden, width = spec.hidden, spec.per_layer_width
    yield Target("embed", ((EMBED, (spec.vocab, hidden)),))
    if width:
        if ple == "device":
            yield Target("per_layer_embed", ((PER_LAYER_EMBED, (spec.per_layer_vocab, width)),))
        yield Target("per_layer_model_projection", (("per_layer_model_projection.weight", (width, hidden)),))
        yield Target("per_layer_norm", (("per_layer_projection_norm.weight", (spec.per_layer_input,)),), is_norm=True)
    yield from _layer_targets(spec)
    yield Target("norm", (("norm.weight", (hidden,)),), is_norm=True)
    if untied_head:
        yield Target("head", ((HEADS[0], (spec.vocab, hidden)),))


def assistant_targets(spec):
    """Every array of an AssistantSpec that is filled as a model's are, with the checkpoint tensors, in full."""
    yield Target("head", (("model." + EMBED, (spec.vocab, spec.hidden)),))
    yield from _layer_targets(spec, "model.")
    yield Target("norm", (("model.norm.weight", (spec.hidden,)),), is_norm=True)
    yield Target("post", (("post_projection.weight", (spec.backbone, spec.hidden)),))
    if spec.n_centroids:
        yield Target("centroids", (("masked_embedding.centroids.weight", (spec.n_centroids, spec.hidden)),))


def _layer_targets(spec, prefix=""):
    """Those of all layers; prefix: of the checkpoint's names."""
    for i, layer in enumerate(spec.layers):
        at = f"layers.{i}."
        for name, *parts in _layer_parts(spec, layer):
            yield Target(at + name, tuple((prefix + at + tensor, shape) for tensor, shape in parts),
                         is_norm=name.endswith(("_norm", "_norm_1")),
                         in_out=name.startswith("experts_") and layer.moe.in_out)


def _layer_parts(spec, layer):
    """(array, (tensor, shape), ...) of all arrays of a layer, names without `layers.N.`."""
    hidden, per_layer = spec.hidden, spec.per_layer_input
    yield "input_norm", ("input_layernorm.weight", (hidden,))
    yield from _attention_parts(layer, hidden)
    if layer.sandwich:
        yield "post_attention_norm", ("post_attention_layernorm.weight", (hidden,))
    # Without norms on outputs, "post attention" is a place: before the MLP.
    before = "pre_feedforward_layernorm" if layer.sandwich else "post_attention_layernorm"
    yield "pre_mlp_norm", (before + ".weight", (hidden,))
    is_gemma = layer.moe.routing == "softmax" if layer.moe else layer.sandwich
    if layer.dense:
        at = "mlp." if is_gemma else "feed_forward.shared_expert." if layer.moe else "feed_forward."
        yield "gate_up", *((f"{at}{half}_proj.weight", (layer.dense.intermediate, hidden)) for half in ("gate", "up"))
        yield "down", (at + "down_proj.weight", (hidden, layer.dense.intermediate))
    if layer.sandwich:
        yield "post_mlp_norm", ("post_feedforward_layernorm.weight", (hidden,))
    if layer.moe:
        yield from _gemma_router_parts(layer.moe, hidden) if is_gemma else _llama_router_parts(layer.moe, hidden)
        yield from _expert_parts(layer.moe, hidden, "" if is_gemma else "feed_forward.")
    if per_layer:
        yield "per_layer_gate", ("per_layer_input_gate.weight", (per_layer, hidden))
        yield "per_layer_projection", ("per_layer_projection.weight", (hidden, per_layer))
        yield "post_per_layer_norm", ("post_per_layer_input_norm.weight", (hidden,))
    if layer.layer_scalar:
        yield "layer_scalar", ("layer_scalar", (1,))


def _attention_parts(layer, hidden):
    attention = layer.attention
    owned = () if layer.kv_from is not None else ("k",) if attention.v_is_k else ("k", "v")
    yield ("qkv", ("self_attn.q_proj.weight", (attention.q_width, hidden)),
           *((f"self_attn.{part}_proj.weight", (attention.kv_width, hidden)) for part in owned))
    if attention.qk_norm == "weighted":
        for part in ("q", "k") if owned else ("q",):
            yield part + "_norm", (f"self_attn.{part}_norm.weight", (attention.head_dim,))
    yield "o", ("self_attn.o_proj.weight", (hidden, attention.q_width))


def _gemma_router_parts(moe, hidden):
    yield "router", ("router.proj.weight", (moe.n_experts, hidden))
    yield "router_scale", ("router.scale", (hidden,))
    yield "per_expert_scale", ("router.per_expert_scale", (moe.n_experts,))
    yield "post_mlp_norm_1", ("post_feedforward_layernorm_1.weight", (hidden,))
    yield "pre_moe_norm", ("pre_feedforward_layernorm_2.weight", (hidden,))
    yield "post_moe_norm", ("post_feedforward_layernorm_2.weight", (hidden,))


def _llama_router_parts(moe, hidden):
    yield "router", ("feed_forward.router.weight", (moe.n_experts, hidden))


def _expert_parts(moe, hidden, at):
    n, wide = moe.n_experts, moe.intermediate
    gate_up, down = ((hidden, 2 * wide), (wide, hidden)) if moe.in_out else ((2 * wide, hidden), (hidden, wide))
    yield "experts_gate_up", (at + "experts.gate_up_proj", (n, *gate_up))
    yield "experts_down", (at + "experts.down_proj", (n, *down))


def _left_over(spec):
    """Names (prefix stripped) that released files hold and no layer reads: k and v of layers that read another's."""
    for i, layer in enumerate(spec.layers):
        if layer.kv_from is not None:
            parts = ("k_proj", "k_norm") if layer.attention.v_is_k else ("k_proj", "k_norm", "v_proj")
            yield from (f"layers.{i}.self_attn.{part}.weight" for part in parts)


def n_weights(spec, ple="device"):
    """Elements of all arrays on the lane; a tied head is the embedding and counts once."""
    return sum(prod(target.shape) for target in (*targets(spec, not spec.tied, ple), *media_targets(spec)))


def media_targets(spec):
    """Every array that the vision part of a ModelSpec needs, as `targets` does for the text part."""
    return vision_targets(spec.media.tower, spec.hidden) if spec.media else ()


def without_missing_media(spec, tensors):
    """The ModelSpec that a checkpoint can fill: one without any tensor of a vision part is a text model, whatever its
    config.json says."""
    return spec if any(map(is_vision, tensors)) else spec.text_only()


@dataclass(frozen=True)
class Account:
    """Where each tensor of a checkpoint goes.

    names        expected tensor → its name in the file, of all that goes to the lane
    table        name in the file of the table of per-layer inputs, where it stays there, or None
    unused       names in the file that this run does not read
    untied_head  the head has a matrix of its own
    problems     what is missing, misshapen or surplus, a sentence each
    """

    names: dict
    unused: tuple = ()
    untied_head: bool = False
    problems: tuple = ()
    table: str | None = None


def account(spec, tensors, ple="device"):
    """The Account of a checkpoint's tensors (name → object with .shape) against what `spec` needs. With ple="host" the
    table of per-layer inputs stays in the file."""
    prefix = next((p for p in PREFIXES if p + EMBED in tensors), None)
    if prefix is None:
        begins = ", ".join(sorted(tensors)[:3]) or "nothing"
        return Account({}, problems=(f"the checkpoint has no {EMBED} under any of the known prefixes "
                                     f"({', '.join(PREFIXES)}); it begins with {begins}",))
    head = next((name for name in HEADS if name in tensors), None)
    untied_head = not spec.tied and head is not None
    names, shapes = {}, {}
    for target in targets(spec, untied_head):
        for tensor, shape in target.parts:
            names[tensor], shapes[tensor] = head if tensor == HEADS[0] else prefix + tensor, shape
    prefixes = spelled(tensors) if spec.media else {}
    for target in media_targets(spec):
        for tensor, shape in target.parts:
            begin, dot, rest = tensor.partition(".")
            names[tensor], shapes[tensor] = prefixes[begin + dot] + rest, shape
    used = set(names.values())
    known = {head, *(prefix + tensor for tensor in _left_over(spec))}
    known.update(name for name in tensors if name.startswith(spec.unused_prefixes) and not (
        spec.media and is_vision(name) and not is_pooling_head(spec.media.tower, name)))
    unused = tuple(name for name in tensors if name not in used and name in known)
    expected = {name: shapes[tensor] for tensor, name in names.items()}
    problems = _problems(expected, unused, tensors, f"{spec.architecture} with {len(spec.layers)} layers")
    table = names.pop(PER_LAYER_EMBED, None) if ple == "host" else None
    return Account(names, unused, untied_head, problems, table)


def account_assistant(spec, tensors):
    """The Account of a draft's tensors against what an AssistantSpec needs."""
    expected = {tensor: shape for target in assistant_targets(spec) for tensor, shape in target.parts}
    expected[PRE_PROJECTION] = spec.hidden, 2 * spec.backbone
    if spec.n_centroids:
        expected[TOKEN_ORDERING] = (spec.vocab,)
    unused = tuple(name for name in HEADS[:1] if name in tensors)          # the embedding again
    problems = _problems(expected, unused, tensors, f"a draft model with {len(spec.layers)} layers")
    return Account({name: name for name in expected}, unused, problems=problems)


def _problems(expected, unused, tensors, what):
    """What is wrong with the tensors of a checkpoint, a sentence each: `expected` {name: shape} must be there, and no
    other but those that are unused."""
    surplus = [name for name in tensors if name not in expected and name not in unused]
    problems = _with_nearest({name: f"the checkpoint has no {name} {list(shape)}"
                              for name, shape in expected.items() if name not in tensors}, surplus)
    problems += [f"{name} is {list(tensors[name].shape)}, expected {list(shape)} by config.json"
                 for name, shape in expected.items() if name in tensors and tuple(tensors[name].shape) != shape]
    return tuple(problems + _with_nearest({name: f"{name} is not a tensor of {what}" for name in surplus}, expected))


def checked_account(spec, tensors, ple="device"):
    """The Account of a checkpoint without problems; raises CheckpointError that tells the first of them."""
    return checked(account(spec, tensors, ple))


def checked(accounts):
    """An Account without problems; raises CheckpointError that tells the first of them."""
    if accounts.problems:
        first, *more = accounts.problems
        rest = f" (and {len(more)} more; `python -m engine inspect` lists them)" if more else ""
        raise CheckpointError(first + rest)
    return accounts


def _with_nearest(problems, candidates):
    """The sentences of {name: sentence}, the first few with the nearest of `candidates`: in a large checkpoint with
    other names throughout, each look-up takes 50 ms."""
    sentences = list(problems.values())
    for i, name in enumerate(list(problems)[:N_HINTS]):
        close = difflib.get_close_matches(name, candidates, n=1)
        sentences[i] += f"; the nearest name is {close[0]}" if close else ""
    return sentences
