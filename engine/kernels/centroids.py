"""The head of a draft model that looks at the tokens of some centroids only (cuda/centroids.cu). Twin:
engine/reference_centroids.py."""

import numpy as np

from engine.errors import ConfigError, ShapeError
from engine.kernels.match import match
from engine.kernels.sampling import CONSTANTS, COUNTERS, THREADS
from engine.kernels.source import BF16, Kernel

PICK_CENTROIDS, CANDIDATE_ARGMAX, NO_LOGITS, CANDIDATE_LOGITS = (
    Kernel("centroids.cu", entry)
    for entry in ("pick_centroids", "candidate_argmax", "no_logits", "candidate_logits"))
TILE = THREADS // 32 * 4        # candidates of a block
MOST_CENTROIDS = 8192           # whose scores take 32 KB of shared memory, as do the values of
MOST_HIDDEN = 16384             # a row
MULTIPLE = 4                    # of both


def pick_centroids(scores, out):
    """out[i] = the centroids with the largest scores, largest first; of equal ones the lowest number, NaN last.

    scores  [n_rows, n_centroids] f32; n_centroids a multiple of 4, up to MOST_CENTROIDS
    out     [n_rows, n_chosen] i32, 1 <= n_chosen <= n_centroids
    Raises ShapeError.
    """
    dims = match("pick_centroids", scores=(scores, "n_rows n_centroids", np.float32),
                 out=(out, "n_rows n_chosen", np.int32))
    if dims.n_centroids % MULTIPLE or dims.n_centroids > MOST_CENTROIDS:
        raise ShapeError(f"pick_centroids: {dims.n_centroids} centroids, expected a multiple of {MULTIPLE} up to "
                         f"{MOST_CENTROIDS}")
    if not 1 <= dims.n_chosen <= dims.n_centroids:
        raise ShapeError(f"pick_centroids: {dims.n_chosen} of {dims.n_centroids} centroids, expected 1 to all of them")
    PICK_CENTROIDS(**CONSTANTS).launch((-(-dims.n_centroids // THREADS), dims.n_rows), (THREADS,),
                                       (scores, out, dims.n_centroids, dims.n_chosen), smem=4 * dims.n_centroids)


def candidate_argmax(g, head, ordering, chosen, out, scratch):
    """out[i] = the candidate with the largest g[i] · head[candidate], summed in float32; the lowest id on ties.

    g         [n_rows, hidden] bf16; hidden a multiple of 4, up to MOST_HIDDEN
    head      [vocab, hidden] bf16
    ordering  [n_centroids, size] i32: the tokens of each centroid; -1 in the place of one that is never drafted
    chosen    [n_rows, n_chosen] i32: the candidates are the tokens of these centroids, each there once; out is 0 where
              that is none
    out       [n_rows] i32
    scratch   Scratch with COUNTERS counters a row, zero before and after
    Raises ShapeError. A row's token depends on that row alone.
    """
    dims = _dims("candidate_argmax", g, head, ordering, chosen, out=(out, "n_rows", np.int32))
    if len(scratch.counters) < dims.n_rows * COUNTERS:
        raise ShapeError(f"candidate_argmax: scratch.counters holds {len(scratch.counters)}, expected at least "
                         f"{dims.n_rows * COUNTERS}, {COUNTERS} a row")
    _launch(CANDIDATE_ARGMAX, dims, g, head, ordering, chosen, out, scratch.counters, dims.n_chosen, dims.size,
            dims.hidden)


def candidate_logits(g, head, ordering, chosen, out):
    """out[i, t] = g[i] · head[t] for the candidates t of row i, as candidate_argmax compares them; -inf for all others.

    out     [n_rows, vocab] f32; the others as candidate_argmax takes them
    Raises ShapeError.
    """
    dims = _dims("candidate_logits", g, head, ordering, chosen, out=(out, "n_rows vocab", np.float32))
    NO_LOGITS(**CONSTANTS).launch((-(-out.size // (4 * THREADS)),), (THREADS,), (out, out.size))
    _launch(CANDIDATE_LOGITS, dims, g, head, ordering, chosen, out, dims.n_chosen, dims.size, dims.hidden, dims.vocab)


def _dims(op, g, head, ordering, chosen, **out):
    dims = match(op, g=(g, "n_rows hidden", BF16), head=(head, "vocab hidden", BF16),
                 ordering=(ordering, "n_centroids size", np.int32), chosen=(chosen, "n_rows n_chosen", np.int32), **out)
    if dims.hidden % MULTIPLE or not 0 < dims.hidden <= MOST_HIDDEN:
        raise ShapeError(f"{op}: rows of {dims.hidden} values, expected a multiple of {MULTIPLE} up to {MOST_HIDDEN}")
    return dims


def _launch(kernel, dims, *args):
    grid = -(-dims.n_chosen * dims.size // TILE), dims.n_rows
    kernel(**CONSTANTS).launch(grid, (THREADS,), args, smem=2 * dims.hidden)


def check(n_centroids):
    """Raises ConfigError for a number of centroids that no kernel takes."""
    if n_centroids % MULTIPLE or n_centroids > MOST_CENTROIDS:
        raise ConfigError(f"num_centroids is {n_centroids}: the kernels take multiples of {MULTIPLE} up to "
                          f"{MOST_CENTROIDS}; device='cpu' takes any")


def variants(spec, max_tokens):
    """(Build, threads of a block, bytes of dynamic shared memory, at its most) of all that is launched."""
    for kernel, smem in ((PICK_CENTROIDS, 4 * MOST_CENTROIDS), (CANDIDATE_ARGMAX, 2 * MOST_HIDDEN), (NO_LOGITS, 0),
                         (CANDIDATE_LOGITS, 2 * MOST_HIDDEN)):
        yield kernel(**CONSTANTS), THREADS, smem
