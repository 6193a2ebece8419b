"""Checkpoint tensors → device arrays: q/k/v and gate/up fused, every tensor of the file accounted for.

The only file that knows how checkpoints spell their tensors.
"""

import difflib
from dataclasses import dataclass, field
from math import prod

from engine.errors import CheckpointError

# Released multimodal files, what recent transformers calls them in memory and saves, and text-only files.
PREFIXES = ("language_model.model.", "model.language_model.", "model.")
HEADS = ("lm_head.weight", "language_model.lm_head.weight")
EMBED = "embed_tokens.weight"
N_HINTS = 5         # problems of a kind that are told with the nearest name


@dataclass(frozen=True)
class Target:
    """One array of the engine: the rows of `parts`, ((checkpoint name, shape), ...), one below the other."""

    name: str
    parts: tuple
    is_norm: bool = False

    @property
    def shape(self):
        first = self.parts[0][1]
        return (sum(shape[0] for _, shape in self.parts), *first[1:])


@dataclass
class LayerWeights:
    """Arrays of one layer; linears are [out, in]. qkv stacks q, k and (unless v is k) v; gate_up stacks both halves."""

    input_norm: object = None
    qkv: object = None
    q_norm: object = None
    k_norm: object = None
    o: object = None
    post_attention_norm: object = None
    pre_mlp_norm: object = None
    gate_up: object = None
    down: object = None
    post_mlp_norm: object = None
    layer_scalar: object = None


@dataclass
class Weights:
    """Arrays of a model. `head` is `embed` where they are tied. `norm_offset` is what RMSNorm still has to add.

    unused    names in the file that this run does not read
    """

    embed: object = None
    norm: object = None
    head: object = None
    layers: list = field(default_factory=list)
    norm_offset: float = 0.0
    unused: tuple = ()


def targets(spec, untied_head=False):
    """Every array that a ModelSpec needs, with the checkpoint tensors (prefix stripped) that fill it."""
    hidden = spec.hidden
    yield Target("embed", ((EMBED, (spec.vocab, hidden)),))
    for i, layer in enumerate(spec.layers):
        attention, wide = layer.attention, layer.mlp.intermediate
        def target(name, *parts, at=f"layers.{i}.", is_norm=False):
            return Target(at + name, tuple((f"{at}{tensor}", shape) for tensor, shape in parts), is_norm)
        qkv = [("self_attn.q_proj.weight", (attention.q_width, hidden)),
               ("self_attn.k_proj.weight", (attention.kv_width, hidden))]
        if not attention.v_is_k:
            qkv.append(("self_attn.v_proj.weight", (attention.kv_width, hidden)))
        yield target("input_norm", ("input_layernorm.weight", (hidden,)), is_norm=True)
        yield target("qkv", *qkv)
        yield target("q_norm", ("self_attn.q_norm.weight", (attention.head_dim,)), is_norm=True)
        yield target("k_norm", ("self_attn.k_norm.weight", (attention.head_dim,)), is_norm=True)
        yield target("o", ("self_attn.o_proj.weight", (hidden, attention.q_width)))
        yield target("post_attention_norm", ("post_attention_layernorm.weight", (hidden,)), is_norm=True)
        yield target("pre_mlp_norm", ("pre_feedforward_layernorm.weight", (hidden,)), is_norm=True)
        yield target("gate_up", ("mlp.gate_proj.weight", (wide, hidden)), ("mlp.up_proj.weight", (wide, hidden)))
        yield target("down", ("mlp.down_proj.weight", (hidden, wide)))
        yield target("post_mlp_norm", ("post_feedforward_layernorm.weight", (hidden,)), is_norm=True)
        if layer.layer_scalar:
            yield target("layer_scalar", ("layer_scalar", (1,)))
    yield Target("norm", (("norm.weight", (hidden,)),), is_norm=True)
    if untied_head:
        yield Target("head", ((HEADS[0], (spec.vocab, hidden)),))


def n_weights(spec):
    """Elements of all arrays; a tied head is the embedding and counts once."""
    return sum(prod(target.shape) for target in targets(spec, untied_head=not spec.tied))


@dataclass(frozen=True)
class Account:
    """Where each tensor of a checkpoint goes.

    names        expected tensor → its name in the file
    unused       names in the file that a text run does not read
    untied_head  the head has a matrix of its own
    problems     what is missing, misshapen or surplus, a sentence each
    """

    names: dict
    unused: tuple = ()
    untied_head: bool = False
    problems: tuple = ()


def account(spec, tensors):
    """The Account of a checkpoint's tensors (name → object with .shape) against what `spec` needs."""
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
    used = set(names.values())
    unused = tuple(name for name in tensors
                   if name not in used and (name == head or name.startswith(spec.unused_prefixes)))
    surplus = [name for name in tensors if name not in used and name not in unused]
    problems = _with_nearest({name: f"the checkpoint has no {name} {list(shapes[tensor])}"
                              for tensor, name in names.items() if name not in tensors}, surplus)
    problems += [f"{name} is {list(tensors[name].shape)}, expected {list(shapes[tensor])} by config.json"
                 for tensor, name in names.items() if name in tensors and tuple(tensors[name].shape) != shapes[tensor]]
    problems += _with_nearest({name: f"{name} is not a tensor of {spec.architecture} with {len(spec.layers)} layers"
                               for name in surplus}, used)
    return Account(names, unused, untied_head, tuple(problems))


def checked_account(spec, tensors):
    """The Account of a checkpoint without problems; raises CheckpointError that tells the first of them."""
    accounts = account(spec, tensors)
    if accounts.problems:
        first, *more = accounts.problems
        rest = f" (and {len(more)} more; `python -m engine inspect` lists them)" if more else ""
        raise CheckpointError(first + rest)
    return accounts


def load(spec, checkpoint, accounts, lane, progress):
    """Reads `checkpoint` (loaders.safetensors) into arrays of `lane`; `progress(n_bytes)` is called as bytes arrive."""
    weights = Weights(layers=[LayerWeights() for _ in spec.layers], unused=accounts.unused,
                      norm_offset=0.0 if lane.folds_norm_offset else spec.norm_offset)
    with lane.loading() as fill:
        for target in targets(spec, accounts.untied_head):
            array, row = lane.empty(target.shape), 0
            for tensor, shape in target.parts:
                fill(array[row:row + shape[0]], _reader(checkpoint, accounts.names[tensor], progress))
                row += shape[0]
            if target.is_norm and lane.folds_norm_offset:
                array += spec.norm_offset
            owner, _, attribute = target.name.rpartition(".")
            setattr(weights.layers[int(owner.split(".")[1])] if owner else weights, attribute, array)
    weights.head = weights.embed if weights.head is None else weights.head
    return weights


def _reader(checkpoint, name, progress):
    """read(begin, end, out) of one tensor, for a lane's `fill`."""
    def read(begin, end, out):
        progress(checkpoint.read_range(name, begin, end, out))
    return read


def _with_nearest(problems, candidates):
    """The sentences of {name: sentence}, the first few with the nearest of `candidates`: in a large checkpoint with
    other names throughout, each look-up takes 50 ms."""
    sentences = list(problems.values())
    for i, name in enumerate(list(problems)[:N_HINTS]):
        close = difflib.get_close_matches(name, candidates, n=1)
        sentences[i] += f"; the nearest name is {close[0]}" if close else ""
    return sentences
