"""Tokens and log-probabilities from logits, on the device: launchers of cuda/sampling.cu. Twin: engine/sampler.py."""

import numpy as np

from engine.errors import ShapeError
from engine.kernels.match import match
from engine.kernels.source import Kernel
from engine.sampler import MAX_VOCAB
from engine.workspace import MOST_TOP

THREADS = 256
N_BINS = 44 * 32 + 1        # of weights: 32 for each power of two up to 2**44, and one for 2**44 itself
LISTED = 4096               # tokens of one row that are sorted out without another look at its logits
ROW_BYTES = 40              # of Row and Kept
COUNTERS = 4                # a row
BINS_BYTES = 12 * (N_BINS + 1)              # in shared memory: the bins of a row,
DIGITS_BYTES = 8192                         # and counters for 10 bits of a number, or MOST_TOP numbers to sort
LEAST_CHUNK, MOST_CHUNK = 2048, 16384       # logits of a block; above the latter its 32-bit sums could overflow
ENOUGH_BLOCKS = 512         # about two to each multiprocessor of the largest GPUs we name

CONSTANTS = {"THREADS": THREADS, "N_BINS": N_BINS}
APPLY_EDITS, LARGEST_LOGIT, COUNT_WEIGHTS, DRAW, SUM_WEIGHTS, LIST_LIKELIEST = (
    Kernel("sampling.cu", entry)
    for entry in ("apply_edits", "largest_logit", "count_weights", "draw", "sum_weights", "list_likeliest"))
SMEM = {COUNT_WEIGHTS: BINS_BYTES, DRAW: BINS_BYTES + DIGITS_BYTES, SUM_WEIGHTS: 4 * N_BINS,
        LIST_LIKELIEST: DIGITS_BYTES}


def scratch_size(n_rows, vocab):
    """(n_floats, n_counters) of scratch that sample, top_logprobs and the ops of rejection.py use."""
    row_bytes = ROW_BYTES + 8 * N_BINS + 4 * (N_BINS + 1) + 8 * _capacity(vocab)
    return n_rows * row_bytes // 4, n_rows * COUNTERS


def variants(spec, max_tokens):
    """(Build, threads of a block, bytes of dynamic shared memory) of all that sampling launches."""
    for kernel in (APPLY_EDITS, LARGEST_LOGIT, COUNT_WEIGHTS, DRAW, SUM_WEIGHTS, LIST_LIKELIEST):
        yield kernel(**CONSTANTS), THREADS, SMEM.get(kernel, 0)


def chunk_of(n_rows, vocab):
    """How many logits a block takes: enough blocks to fill a GPU, unless that leaves them too little work."""
    even = -(-n_rows * vocab // ENOUGH_BLOCKS)
    return min(max(-(-even // 1024) * 1024, LEAST_CHUNK), MOST_CHUNK)


def apply_edits(logits, edits):
    """l + bias; if seen, l / r where l > 0, else l * r; - frequency * n; - presence where n > 0; if banned, -inf.

    logits  [n_rows, vocab] f32, changed in place
    edits   the fields of LogitEdits: row, token, bias, is_seen, n_in_output, is_banned [capacity]; repetition,
            presence, frequency [n_rows]; and n_edits [1] i32: so many of the entries count
    Raises ShapeError. Source: engine/sampler.py.
    """
    i32, f32, bits = np.int32, np.float32, np.bool_
    dims = match("apply_edits", logits=(logits, "n_rows vocab", f32), row=(edits.row, "capacity", i32),
                 token=(edits.token, "capacity", i32), bias=(edits.bias, "capacity", f32),
                 is_seen=(edits.is_seen, "capacity", bits), n_in_output=(edits.n_in_output, "capacity", i32),
                 is_banned=(edits.is_banned, "capacity", bits), repetition=(edits.repetition, "n_rows", f32),
                 presence=(edits.presence, "n_rows", f32), frequency=(edits.frequency, "n_rows", f32),
                 n_edits=(edits.n_edits, "1", i32))
    launch(APPLY_EDITS, (-(-dims.capacity // THREADS),), logits, edits.row, edits.token, edits.bias, edits.is_seen,
           edits.n_in_output, edits.is_banned, edits.repetition, edits.presence, edits.frequency, edits.n_edits,
           dims.vocab)


def sample(logits, batch, out, scratch, domain=0):
    """One token a row: the lowest-id argmax of a greedy row, a draw from the target distribution of any other.

    logits   [n_rows, vocab] f32, already edited, not changed; 1 <= vocab < 2**19
    batch    the fields of SamplingBatch, [n_rows] each
    out      [n_rows] i32
    scratch  Scratch of scratch_size(n_rows, vocab)
    domain   which family of random words: 0 sample, 1 draft proposal, 3 residual
    Raises ShapeError. Source: engine/sampler.py, whose tokens these are.
    """
    dims = match("sample", logits=(logits, "n_rows vocab", np.float32), out=(out, "n_rows", np.int32),
                 **columns(batch))
    grid, sizes, filters = count_weights("sample", dims, logits, batch, out, scratch)
    launch(DRAW, grid, logits, *filters, batch.least_weight, batch.seed, batch.position, out, *scratch, *sizes, domain)


def columns(batch):
    """What match() takes of a SamplingBatch."""
    fields = {"is_greedy": np.bool_, "inverse_temperature": np.float32, "top_k": np.int32, "top_p": np.int64,
              "least_weight": np.int64, "seed": np.uint64, "position": np.int64}
    return {name: (getattr(batch, name), "n_rows", dtype) for name, dtype in fields.items()}


def count_weights(op, dims, logits, batch, out, scratch):
    """The first half of a draw: out = the argmax, and in scratch the bins with a cut. Returns the grid and the sizes of
    further launches, and the arguments that they begin with after logits."""
    grid, sizes = geometry(op, dims, scratch)
    filters = batch.is_greedy, batch.inverse_temperature, batch.top_k, batch.top_p
    launch(LARGEST_LOGIT, grid, logits, out, *scratch, *sizes)
    launch(COUNT_WEIGHTS, grid, logits, *filters, *scratch, *sizes)
    return grid, sizes, filters


def top_logprobs(logits, chosen, n, out_chosen, out_ids, out_logprobs, scratch):
    """Log-softmax of raw logits: at the chosen tokens, and the n largest, likeliest first, the lowest id on ties.

    logits        [n_rows, vocab] f32, before edits and temperature; 1 <= vocab < 2**19
    chosen        [n_rows] i32, in 0 .. vocab - 1
    n             0 .. min(vocab, MOST_TOP)
    out_chosen    [n_rows] f32
    out_ids       [n_rows, n] i32
    out_logprobs  [n_rows, n] f32
    scratch       Scratch of scratch_size(n_rows, vocab)
    NaN is last, and a row whose maximum is NaN, inf or -inf gets NaN: engine/sampler.py, whose ids these are; the
    values come from weights in fixed point, so they do not depend on an order of adding. Raises ShapeError.
    """
    dims = match("top_logprobs", dims={"n": n}, logits=(logits, "n_rows vocab", np.float32),
                 chosen=(chosen, "n_rows", np.int32), out_chosen=(out_chosen, "n_rows", np.float32),
                 out_ids=(out_ids, "n_rows n", np.int32), out_logprobs=(out_logprobs, "n_rows n", np.float32))
    if not 0 <= n <= min(dims.vocab, MOST_TOP):
        raise ShapeError(f"top_logprobs: n is {n}, expected 0 .. {min(dims.vocab, MOST_TOP)}; engine.sampler finds "
                         "more")
    grid, sizes = geometry("top_logprobs", dims, scratch)
    launch(LARGEST_LOGIT, grid, logits, None, *scratch, *sizes)
    launch(SUM_WEIGHTS, grid, logits, chosen, out_chosen, *scratch, *sizes, n)
    if n:
        launch(LIST_LIKELIEST, grid, logits, out_ids, out_logprobs, *scratch, *sizes, n)


def launch(kernel, grid, *args):
    """Runs a kernel of sampling.cu over a grid of blocks."""
    kernel(**CONSTANTS).launch(grid, (THREADS,), args, smem=SMEM.get(kernel, 0))


def _capacity(vocab):
    return min(vocab, LISTED)


def geometry(op, dims, scratch):
    """(grid, (vocab, chunk, capacity)) of a launch over all rows."""
    if not 1 <= dims.vocab <= MAX_VOCAB:
        raise ShapeError(f"{op}: logits are [{dims.n_rows}, {dims.vocab}], expected vocab in 1 .. {MAX_VOCAB}")
    for name, array, least in zip(scratch._fields, scratch, scratch_size(dims.n_rows, dims.vocab), strict=True):
        if len(array) < least:
            raise ShapeError(f"{op}: scratch.{name} holds {len(array)}, expected at least {least} (scratch_size)")
    chunk = chunk_of(dims.n_rows, dims.vocab)
    return (-(-dims.vocab // chunk), dims.n_rows), (dims.vocab, chunk, _capacity(dims.vocab))
