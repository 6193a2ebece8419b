"""Judging drafted tokens on the device: launchers of cuda/rejection.cu. Twin: engine/reference_drafts.py."""

import numpy as np

from engine.errors import ShapeError
from engine.kernels.match import match
from engine.kernels.sampling import (
    BINS_BYTES,
    CONSTANTS,
    DIGITS_BYTES,
    LARGEST_LOGIT,
    THREADS,
    columns,
    count_weights,
    geometry,
    launch,
)
from engine.kernels.source import Kernel

DELTA_ONE = 1 << 32         # of relax_drafts: delta is counted in units of 2**-32
FIND_KEPT, DRAW_DRAFT, DRAW_WITH_DRAFT, RELAX_DRAFTS, ACCEPT_DRAFTS = (
    Kernel("rejection.cu", entry)
    for entry in ("find_kept", "draw_draft", "draw_with_draft", "relax_drafts", "accept_drafts"))
SMEM = {FIND_KEPT: BINS_BYTES + DIGITS_BYTES}


def variants(spec, max_tokens):
    """(Build, threads of a block, bytes of dynamic shared memory) of all that is launched."""
    for kernel in (FIND_KEPT, DRAW_DRAFT, DRAW_WITH_DRAFT, RELAX_DRAFTS, ACCEPT_DRAFTS):
        yield kernel(**CONSTANTS), THREADS, SMEM.get(kernel, 0)


def accept_drafts(tokens, drafts, slot_begin, slot_rows, positions, out):
    """How many drafts of each sequence hold, and where it goes on.

    tokens      [n_slots] i32: what each slot emits if the drafts before it hold
    drafts      [n_slots] i32: the draft that the slot checks; -1 in the last slot of a sequence
    slot_begin  [n_seqs + 1] i32: slots of sequence b are slot_begin[b] .. slot_begin[b + 1]
    slot_rows   [n_slots] i32: row of each slot among the states
    positions   [n_seqs] i32: position of each sequence's first slot
    out         Accepted, of other memory than positions
    A sequence without slots gets 0 accepted, token 0, row 0 and its position. Raises ShapeError.
    """
    i32 = np.int32
    dims = match("accept_drafts", tokens=(tokens, "n_slots", i32), drafts=(drafts, "n_slots", i32),
                 slot_rows=(slot_rows, "n_slots", i32), positions=(positions, "n_seqs", i32),
                 **{f"out.{name}": (array, "n_seqs", i32) for name, array in out._asdict().items()})
    match("accept_drafts", slot_begin=(slot_begin, str(dims.n_seqs + 1), i32))
    _launch(ACCEPT_DRAFTS, (-(-dims.n_seqs // THREADS),), tokens, drafts, slot_begin, slot_rows, positions, *out,
            dims.n_seqs)


def sample_drafts(logits, batch, out, probs, scratch, positions=None, ahead=0):
    """Drafts drawn from their filtered distribution, and that distribution.

    logits     [n_rows, vocab] f32, not changed; 1 <= vocab < 2**19
    batch      the fields of SamplingBatch, [n_rows] each: the target's rules and seeds
    out        [n_rows] i32
    probs      [n_rows, vocab] f32, 0 where a token cannot come; of a greedy row, or one whose maximum is not finite, 1
               at the argmax
    scratch    Scratch of sampling.scratch_size(n_rows, vocab)
    positions  None, or [n_rows] i32: the token at positions + ahead is decided, not at batch.position
    Raises ShapeError. Source: engine/reference_drafts.py, whose tokens and probabilities these are.
    """
    dims = match("sample_drafts", logits=(logits, "n_rows vocab", np.float32), out=(out, "n_rows", np.int32),
                 probs=(probs, "n_rows vocab", np.float32), positions=(positions, "n_rows", np.int32), **columns(batch))
    grid, sizes = _find_kept("sample_drafts", dims, logits, batch, out, scratch)
    _launch(DRAW_DRAFT, grid, logits, batch.is_greedy, batch.inverse_temperature, batch.seed, batch.position, positions,
            out, probs, *scratch, *sizes, ahead)


def sample_with_drafts(logits, batch, drafts, draft_probs, out, scratch, prob_rows=None):
    """What each slot emits, where drafts were drawn by sample_drafts.

    logits       [n_slots, vocab] f32, already edited, not changed; 1 <= vocab < 2**19
    batch        the fields of SamplingBatch, [n_slots] each; a greedy row gives its argmax
    drafts       [n_slots] i32, -1 for none: a plain draw
    draft_probs  [n_prob_rows, vocab] f32, what each draft was drawn from; rows of slots without one are not read
    out          [n_slots] i32
    scratch      Scratch of sampling.scratch_size(n_slots, vocab)
    prob_rows    None, or [n_slots] i32: the row of draft_probs of each slot, else its own
    Raises ShapeError. Source: engine/reference_drafts.py, whose tokens these are.
    """
    n_prob_rows = "n_rows" if prob_rows is None else "n_prob_rows"
    dims = match("sample_with_drafts", logits=(logits, "n_rows vocab", np.float32),
                 drafts=(drafts, "n_rows", np.int32), draft_probs=(draft_probs, f"{n_prob_rows} vocab", np.float32),
                 out=(out, "n_rows", np.int32), prob_rows=(prob_rows, "n_rows", np.int32), **columns(batch))
    grid, sizes = _find_kept("sample_with_drafts", dims, logits, batch, out, scratch)
    _launch(DRAW_WITH_DRAFT, grid, logits, batch.is_greedy, batch.inverse_temperature, batch.seed, batch.position,
            drafts, draft_probs, prob_rows, out, *scratch, *sizes)


def relax_drafts(logits, drafts, is_relaxed, top_k, delta, tokens, scratch):
    """Lossy: tokens[i] = the draft where it is likely enough, else the argmax.

    logits      [n_slots, vocab] f32, already edited; probabilities are at temperature 1, without filters
    drafts      [n_slots] i32, -1 for none
    is_relaxed  [n_slots] bool; other rows of tokens stay, and those without a draft
    top_k       a draft is likely enough where fewer than so many tokens are likelier,
    delta       0 .. 1, and its probability, which is not 0, is less than the largest by at most this
    tokens      [n_slots] i32, changed in place
    scratch     Scratch of sampling.scratch_size(n_slots, vocab)
    Raises ShapeError. Source: engine/reference_drafts.py, whose tokens these are.
    """
    dims = match("relax_drafts", logits=(logits, "n_rows vocab", np.float32), drafts=(drafts, "n_rows", np.int32),
                 is_relaxed=(is_relaxed, "n_rows", np.bool_), tokens=(tokens, "n_rows", np.int32))
    if not 0 <= delta <= 1:
        raise ShapeError(f"relax_drafts: delta is {delta}, expected 0 .. 1, a difference of probabilities")
    grid, sizes = geometry("relax_drafts", dims, scratch)
    launch(LARGEST_LOGIT, grid, logits, None, *scratch, *sizes)
    _launch(RELAX_DRAFTS, grid, logits, drafts, is_relaxed, tokens, *scratch, *sizes, top_k, round(delta * DELTA_ONE))


def _find_kept(op, dims, logits, batch, out, scratch):
    grid, sizes, filters = count_weights(op, dims, logits, batch, out, scratch)
    _launch(FIND_KEPT, grid, logits, *filters, batch.least_weight, *scratch, *sizes)
    return grid, sizes


def _launch(kernel, grid, *args):
    kernel(**CONSTANTS).launch(grid, (THREADS,), args, smem=SMEM.get(kernel, 0))
