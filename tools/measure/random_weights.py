"""A checkpoint that is nowhere: random weights for a ModelSpec, made as they are read, to measure with real shapes.

    spec = slice_of(preset("gemma-4-31b"), 12)
    core = Core.open(spec, config, lane, RandomCheckpoint(spec, seed=0))

The text part alone: Core.open takes a model without any vision tensor for one of text.

What a layer gives has about the size of what it gets, so that states stay finite and logits spread at any depth.
Drawing each weight would take minutes for 60 GB: blocks of a few million drawn values are copied instead.
"""

from dataclasses import dataclass, replace
from math import prod

import ml_dtypes
import numpy as np

from engine.tensors import HEADS, PRE_PROJECTION, PREFIXES, TOKEN_ORDERING, assistant_targets, targets
from measure.report import BenchError

POOL = 1 << 22          # drawn values: 8 MB in bfloat16
BLOCK = 1 << 18         # values in a row from one place of the pool; each block of an array begins at another
SPREAD = 0.1            # standard deviation of a norm's weights about what they are near
DTYPE = np.dtype(ml_dtypes.bfloat16)
PREFIX = PREFIXES[-1]   # of a text-only checkpoint


class Values:
    """Arrays of normal values. What an element is depends on seed, the array's number and size, and its place in it."""

    def __init__(self, seed):
        self.seed = seed
        self._drawn = np.random.default_rng(seed).standard_normal(POOL + BLOCK, np.float32)
        self._pools = {}                # {(mean, std, dtype): the drawn values with these}

    def write(self, out, begin, number, size, mean=0.0, std=1.0):
        """out[...] = elements begin.. of the array of that number and size.

        out  flat, float32 or bfloat16: the same values in both
        """
        key = mean, std, np.dtype(out.dtype)
        if key not in self._pools:
            values = self._drawn * np.float32(std) + np.float32(mean)
            self._pools[key] = values.astype(DTYPE).astype(out.dtype)
        pool = self._pools[key]
        starts = np.random.default_rng([self.seed, number]).integers(0, POOL, -(-size // BLOCK)).tolist()
        at, end = begin, begin + len(out)
        while at < end:
            block, offset = divmod(at, BLOCK)
            n = min(BLOCK - offset, end - at)
            first = starts[block] + offset
            out[at - begin:at - begin + n] = pool[first:first + n]
            at += n


@dataclass(frozen=True)
class RandomTensor:
    """One tensor: normal values of this mean and standard deviation, rounded to bfloat16. number: which it is."""

    name: str
    shape: tuple
    number: int
    mean: float
    std: float

    @property
    def n_bytes(self):
        return DTYPE.itemsize * prod(self.shape)


class RandomCheckpoint:
    """What Core.open takes of a checkpoint. tensors: {name: RandomTensor} of all that `spec` needs, named as in a
    text-only checkpoint."""

    def __init__(self, spec, seed=0):
        self.tensors, self._values = {}, Values(seed)
        for target in targets(spec, untied_head=not spec.tied):
            for tensor, shape in target.parts:
                name = tensor if tensor in HEADS else PREFIX + tensor
                self.tensors[name] = RandomTensor(name, shape, len(self.tensors), *_moments(spec, target, shape))

    def read_range(self, name, begin, end, out):
        """out[...] = elements begin..end of the flat tensor; returns how many bytes they take in bfloat16.

        out  [end - begin], float32 or bfloat16: the same values in both
        """
        tensor = self.tensors[name]
        self._values.write(out, begin, tensor.number, prod(tensor.shape), tensor.mean, tensor.std)
        return DTYPE.itemsize * (end - begin)

    def view(self, name):
        """The whole tensor in memory, bfloat16, read-only: what a table that stays on the host is read from."""
        out = np.empty(self.tensors[name].shape, DTYPE)
        self.read_range(name, 0, out.size, out.reshape(-1))
        out.flags.writeable = False
        return out


class RandomDraft(RandomCheckpoint):
    """The same of an AssistantSpec. Its tokens are in random order."""

    def __init__(self, spec, seed=0):
        self.tensors, self._values = {}, Values(seed + 1)
        self._ordering = np.random.default_rng(seed).permutation(spec.vocab)
        shapes = {PRE_PROJECTION: (spec.hidden, 2 * spec.backbone)}
        means = {}
        for target in assistant_targets(spec):
            shapes |= dict(target.parts)
            if target.is_norm:
                means |= dict.fromkeys(dict(target.parts), _multiplier(spec, target))
        for name, shape in shapes.items():
            mean = means.get(name, float(len(shape) == 1))
            std = SPREAD if name in means else 0.0 if len(shape) == 1 else shape[-1] ** -0.5
            self.tensors[name] = RandomTensor(name, shape, len(self.tensors), mean, std)
        if spec.n_centroids:
            self.tensors[TOKEN_ORDERING] = RandomTensor(TOKEN_ORDERING, (spec.vocab,), len(self.tensors), 0.0, 0.0)

    def view(self, name):
        return self._ordering if name == TOKEN_ORDERING else super().view(name)


def _moments(spec, target, shape):
    """(mean, standard deviation) of a tensor's values."""
    if target.is_norm:
        return _multiplier(spec, target) - spec.norm_offset, SPREAD
    if len(shape) == 1:                                                         # a layer's scalar, a router's scales
        return 1.0, 0.0
    tables = {"embed": spec.embed_scale, "per_layer_embed": spec.per_layer_scale}
    if target.name in tables:
        return 0.0, 1 / tables[target.name]
    return 0.0, 1.0 if _reads_unit_rows(spec, target) else target.n_in ** -0.5


def _reads_unit_rows(spec, target):
    """Whether it is a router whose norm gives it rows of length 1, where others have values of about 1: with weights as
    small as theirs all experts would weigh the same."""
    owner, _, attribute = target.name.rpartition(".")
    return attribute == "router" and spec.layers[int(owner.split(".")[1])].moe.routing == "softmax"


def _multiplier(spec, target):
    """What a norm's weights multiply by, about. Those of q and k: such that scores q · k * scale vary by about 1."""
    owner, _, attribute = target.name.rpartition(".")
    if attribute not in ("q_norm", "k_norm"):
        return 1.0
    attention = spec.layers[int(owner.split(".")[1])].attention
    return (attention.scale * attention.head_dim ** 0.5) ** -0.5


def slice_of(spec, n_layers):
    """The first n_layers of a ModelSpec, of true width, between its embedding and its head. A layer that reads
    another's K and V comes after it, so the slice has both."""
    if not 1 <= n_layers <= len(spec.layers):
        raise BenchError(f"{n_layers} layers of a model that has {len(spec.layers)}, expected 1 to {len(spec.layers)}")
    return replace(spec, layers=spec.layers[:n_layers])
