"""Checkpoint tensors of a draft model → device arrays, by the account of engine/tensors.py."""

from dataclasses import dataclass, field
from math import prod

import numpy as np

from engine.errors import CheckpointError
from engine.tensors import PRE_PROJECTION, TOKEN_ORDERING, account_assistant, assistant_targets, checked
from engine.weights import LayerWeights, fill_targets


@dataclass
class AssistantWeights:
    """Arrays of an AssistantSpec; linears are [out, in].

    pre_embed, pre_state  [hidden, backbone]: the columns of the first projection that meet the token's embedding, and
                          those that meet the target's state
    post                  [backbone, hidden]
    head                  [vocab, hidden]
    centroids             [n_centroids, hidden] or None
    ordering              [n_centroids, vocab / n_centroids] int32: the tokens of each centroid, -1 in the place of a
                          suppressed one; or None
    unused                names in the file that nothing reads
    """

    pre_embed: object = None
    pre_state: object = None
    post: object = None
    head: object = None
    norm: object = None
    layers: list = field(default_factory=list)
    centroids: object = None
    ordering: object = None
    unused: tuple = ()


def n_weights(spec):
    """Elements of all arrays in the lane's dtype; the ordering takes 4 bytes a token besides."""
    return sum(prod(target.shape) for target in assistant_targets(spec)) + 2 * spec.hidden * spec.backbone


def weights_bytes(spec, itemsize):
    """What AssistantWeights take."""
    return n_weights(spec) * itemsize + (4 * spec.vocab if spec.n_centroids else 0)


def load_assistant(spec, checkpoint, lane, progress):
    """Reads `checkpoint` (loaders.safetensors) into arrays of `lane`; `progress(n_bytes)` is called as bytes arrive.
    Raises CheckpointError for tensors that are missing, misshapen or surplus, and for an ordering that is none."""
    accounts = checked(account_assistant(spec, checkpoint.tensors))
    weights = AssistantWeights(layers=[LayerWeights() for _ in spec.layers], unused=accounts.unused)
    if spec.n_centroids:
        weights.ordering = lane.to_device(_ordering(spec, checkpoint))
    with lane.loading() as fill:
        fill_targets(weights, assistant_targets(spec), checkpoint, accounts.names, lane, fill, progress)
        weights.pre_embed, weights.pre_state = (lane.empty((spec.hidden, spec.backbone)) for _ in range(2))
        for first, array in ((0, weights.pre_embed), (spec.backbone, weights.pre_state)):
            fill(array, _half_reader(checkpoint, first, spec.backbone, progress))
    return weights


def _half_reader(checkpoint, first, width, progress):
    """read(begin, end, out) of columns first..first + width of the first projection, which has twice as many."""
    def read(begin, end, out):
        at = begin
        while at < end:
            row, column = divmod(at, width)
            n = min(width - column, end - at)
            source = row * 2 * width + first + column
            progress(checkpoint.read_range(PRE_PROJECTION, source, source + n, out[at - begin:at - begin + n]))
            at += n
    return read


def _ordering(spec, checkpoint):
    ordering = np.array(checkpoint.view(TOKEN_ORDERING))
    is_permutation = ordering.dtype.kind in "iu" and np.array_equal(np.sort(ordering), np.arange(spec.vocab))
    if not is_permutation:
        raise CheckpointError(f"{TOKEN_ORDERING} is {ordering.dtype} [{len(ordering)}], expected each token id below "
                              f"{spec.vocab} once, as whole numbers")
    ordering[np.isin(ordering, spec.suppressed)] = -1
    return ordering.astype(np.int32).reshape(spec.n_centroids, -1)
