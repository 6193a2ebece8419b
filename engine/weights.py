"""Checkpoint tensors → device arrays: q/k/v and gate/up fused, as engine/tensors.py accounts for them."""

from dataclasses import dataclass, field
from math import prod

import numpy as np

from engine.errors import CheckpointError
from engine.tensors import media_targets, targets
from engine.vision_weights import VisionWeights

FLOATS = ("bfloat16", "float16", "float32")     # what a table that stays in the file may hold
ROWS = 16                                       # of such a table that share the L2 cache on their way


@dataclass
class LayerWeights:
    """Arrays of one layer, None where it has no such part; linears are [out, in].

    qkv              rows of q, k and (unless v is k) v; of q alone where the layer reads another's K and V
    gate_up, down    the dense MLP, or the branch beside the experts; gate_up stacks both halves
    experts_gate_up  [n_experts, 2 * intermediate, hidden], or [n_experts, hidden, 2 * intermediate] by MoeSpec.in_out
    experts_down     [n_experts, hidden, intermediate], or [n_experts, intermediate, hidden]
    """

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
    router: object = None
    router_scale: object = None
    per_expert_scale: object = None
    experts_gate_up: object = None
    experts_down: object = None
    post_mlp_norm_1: object = None
    pre_moe_norm: object = None
    post_moe_norm: object = None
    per_layer_gate: object = None
    per_layer_projection: object = None
    post_per_layer_norm: object = None


@dataclass
class Weights:
    """Arrays of a model. `head` is `embed` where they are tied. `norm_offset` is what RMSNorm still has to add.

    per_layer_embed             [per_layer_vocab, n_layers * per_layer_input], or None where it stays in the file
    per_layer_model_projection  [n_layers * per_layer_input, hidden]
    per_layer_norm              [per_layer_input]
    per_layer_rows              the HostRows of a table that stays in the file, or None
    vision                      the VisionWeights of a model that sees, or None
    unused                      names in the file that this run does not read
    """

    embed: object = None
    norm: object = None
    head: object = None
    layers: list = field(default_factory=list)
    norm_offset: float = 0.0
    per_layer_embed: object = None
    per_layer_model_projection: object = None
    per_layer_norm: object = None
    per_layer_rows: object = None
    vision: VisionWeights | None = None
    unused: tuple = ()


class HostRows:
    """Rows of an embedding table that stays in its file, mapped: only what is read takes memory, and the system may
    drop that again.

    table  [vocab, width], read-only, of the file's dtype
    scale  multiplies the rows; dtype is what they are rounded to before and after, as a table on the lane would be
    """

    def __init__(self, table, scale, dtype):
        self.table, self.scale, self.dtype = table, np.float32(scale), np.dtype(dtype)

    def __call__(self, token_ids, out=None):
        """out[t] = table[token_ids[t]] * scale; returns out. token_ids [n] whole numbers within the table, out
        [n, width] of `dtype`, made when None."""
        out = np.empty((len(token_ids), self.table.shape[1]), self.dtype) if out is None else out
        for at in range(0, len(token_ids), ROWS):
            rows = self.table[token_ids[at:at + ROWS]].astype(self.dtype, copy=False)
            np.multiply(rows, self.scale, out=out[at:at + ROWS], dtype=np.float32, casting="unsafe")
        return out


def load(spec, checkpoint, accounts, lane, progress):
    """Reads `checkpoint` (loaders.safetensors) into arrays of `lane`; `progress(n_bytes)` is called as bytes arrive."""
    weights = Weights(layers=[LayerWeights() for _ in spec.layers], unused=accounts.unused,
                      vision=VisionWeights.of(spec.media.tower) if spec.media else None,
                      norm_offset=0.0 if lane.folds_norm_offset else spec.norm_offset)
    text = targets(spec, accounts.untied_head, "device" if accounts.table is None else "host")
    with lane.loading() as fill:
        offset = spec.norm_offset if lane.folds_norm_offset else 0.0
        for filled, wanted in ((weights, text), (weights.vision, media_targets(spec))):
            fill_targets(filled, wanted, checkpoint, accounts.names, lane, fill, progress, offset)
    weights.head = weights.embed if weights.head is None else weights.head
    if accounts.table is not None:
        weights.per_layer_rows = _host_rows(spec, checkpoint, accounts.table, lane.dtype)
    return weights


def fill_targets(weights, wanted, checkpoint, names, lane, fill, progress, norm_offset=0.0):
    """Makes the arrays of Targets members of `weights` and its layers. names: expected tensor → its name in the file;
    norm_offset: what is added to weights of norms, where there is any."""
    for target in wanted:
        array, begin = lane.empty(target.shape), 0
        for tensor, shape, order in target.pieces():
            end = begin + prod(shape)
            read = _reader(checkpoint, names[tensor], progress)
            fill(array.reshape(-1)[begin:end], _ordered(read, order) if order else read)
            begin = end
        if target.is_norm and norm_offset:
            array += norm_offset
        owner, _, attribute = target.name.rpartition(".")
        setattr(weights.layers[int(owner.split(".")[1])] if owner else weights, attribute, array)


def _host_rows(spec, checkpoint, name, dtype):
    table = checkpoint.view(name)           # it outlives the checkpoint's files
    if table.dtype.name not in FLOATS:
        raise CheckpointError(f"{name} is {table.dtype.name}, expected one of {', '.join(FLOATS)}")
    return HostRows(table, dtype.type(spec.per_layer_scale), dtype)


def _ordered(read, order):
    """The same of a tensor whose values lie in another order in the array: it is read whole, once, and stays on the
    host until the array is full."""
    whole = []

    def read_ordered(begin, end, out):
        if not whole:
            values = np.empty(prod(order.view), out.dtype)
            read(0, values.size, values)
            whole.append(order(values))
        out[...] = whole[0][begin:end]
    return read_ordered


def _reader(checkpoint, name, progress):
    """read(begin, end, out) of one tensor, for a lane's `fill`."""
    def read(begin, end, out):
        progress(checkpoint.read_range(name, begin, end, out))
    return read
