"""Choosing tokens: edit the logits, filter them to the target distribution, draw one token per row.

Given the same float32 logits every lane picks the same token. Three things make that so: exp and log are our own
(engine/random.py); probabilities become 64-bit integers before any sum, so no result depends on the order of adding;
and the random words of a draw are a function of (seed, position, token) alone, never of batch, row or step.
The draw is an exponential race: token = argmin over survivors of E_token / p_token is distributed as p.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from engine.errors import ShapeError
from engine.random import exp_f32, exponential, token_words
from engine.sampling_params import GREEDY_BELOW

WEIGHT_BITS = 44                    # the likeliest token of a row weighs 2**44
LIKELIEST = 1 << WEIGHT_BITS
LIKELIEST_F32 = np.float32(LIKELIEST)
LEAST_X = np.float32(-31)           # e^-31 * 2**44 is 0.6 and rounds to 1. Less likely tokens are dropped: in a
                                    # vocabulary of 2**18 they hold less than 2**-26 of the mass
MAX_VOCAB = 2**19 - 1               # so a row's mass stays below 2**63
TOP_P_ONE = 1 << 32                 # top_p is counted in units of 2**-32
TIE_MARGIN = np.float32(2)          # a token this far below another has a seventh of its weight: rounding ties no such
LOGITS_AT_ONCE = 1 << 16            # rows of a small vocabulary are drawn together, up to this many logits
BLOCK = 1 << 15


@dataclass(frozen=True)
class LogitEdits:
    """Sparse changes to the logits of a step: one entry per (row, token) that any of them touches.

    row [n] i32, token [n] i32     where; no pair occurs twice
    bias [n] f32                   added first
    is_seen [n] bool               in prompt or output, noted where the row's penalties ask for it
    n_in_output [n] i32            occurrences in the output, likewise
    is_banned [n] bool             becomes -inf, last
    repetition, presence, frequency [n_rows] f32
    """

    row: np.ndarray
    token: np.ndarray
    bias: np.ndarray
    is_seen: np.ndarray
    n_in_output: np.ndarray
    is_banned: np.ndarray
    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray

    @classmethod
    def build(cls, rows):
        """rows: one (SamplingParams, columns or None) per row of logits, as TextEdits.rows gives them, ids in
        [0, vocab)."""
        rows = list(rows)
        entries = [(np.full(len(columns[0]), i), *columns) for i, (_, columns) in enumerate(rows) if columns]
        if not entries:
            return NO_EDITS
        columns = zip(*entries, strict=True)
        penalties = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p, *_ in rows]
        return cls(*(np.concatenate(column).astype(dtype) for column, dtype in zip(columns, EDIT_DTYPES, strict=True)),
                   *np.ascontiguousarray(np.array(penalties, np.float32).T))


EDIT_DTYPES = (np.int32, np.int32, np.float32, bool, np.int32, bool)
NO_EDITS = LogitEdits(*(np.empty(0, dtype) for dtype in (*EDIT_DTYPES, *[np.float32] * 3)))     # of any number of rows


def apply_edits(logits, edits):
    """l + bias; if seen, l / r where l > 0, else l * r; - frequency * n; - presence where n > 0; if banned, -inf.

    logits  [n_rows, vocab] f32, changed in place; one float32 operation at a time, in this order
    edits   LogitEdits of the same rows; r is repetition, n is n_in_output
    Source: repetition, CTRL (arXiv:1909.05858) and HF RepetitionPenaltyLogitsProcessor; the other two, the OpenAI API.
    """
    if not len(edits.token):
        return
    row, n = edits.row, edits.n_in_output
    x = logits[row, edits.token] + edits.bias
    repetition = edits.repetition[row]
    x = np.where(edits.is_seen, np.where(x > 0, x / repetition, x * repetition), x)
    x = x - edits.frequency[row] * n.astype(np.float32) - edits.presence[row] * (n > 0).astype(np.float32)
    logits[row, edits.token] = np.where(edits.is_banned, np.float32(-np.inf), x)


@dataclass(frozen=True)
class SamplingBatch:
    """How each row of a step is sampled, in the form a kernel reads; every field is [n_rows].

    is_greedy            bool
    inverse_temperature  f32, 1 / temperature, taken on the host
    top_k                i32, 0 keeps all
    top_p                i64, in units of 2**-32, 1 .. 2**32; the last keeps all
    least_weight         i64, min_p in units of 2**-44 of the likeliest, at least 1
    seed                 u64
    position             i64, absolute index of the token being decided
    """

    is_greedy: np.ndarray
    inverse_temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    least_weight: np.ndarray
    seed: np.ndarray
    position: np.ndarray

    @classmethod
    def build(cls, rows):
        """rows: one (SamplingParams, seed, position) per row of logits."""
        columns = list(zip(*(_row_rule(*row) for row in rows), strict=True)) or [()] * 7
        dtypes = (bool, np.float32, np.int32, np.int64, np.int64, np.uint64, np.int64)
        return cls(*(np.array(c, d) for c, d in zip(columns, dtypes, strict=True)))

    def along(self, counts):
        """So many rows of each row, which decide tokens one behind the other."""
        batch = SamplingBatch(*(np.repeat(column, counts) for column in vars(self).values()))
        batch.position[:] += np.arange(len(batch.position)) - np.repeat(np.cumsum(counts) - counts, counts)
        return batch


def _row_rule(params, seed, position):
    inverse = max(1 / max(params.temperature, GREEDY_BELOW), 2.0**-126)      # never 0: -inf * 0 is not a number
    top_p = max(1, round(params.top_p * TOP_P_ONE))
    least_weight = max(1, math.ceil(params.min_p * LIKELIEST))
    return params.is_greedy, inverse, min(params.top_k, MAX_VOCAB), top_p, least_weight, seed, position


def sample(logits, batch, domain=0):
    """One token per row: the lowest-id argmax of a greedy row, a draw from the target distribution of any other.

    logits  [n_rows, vocab] f32, already edited; vocab < 2**19
    batch   SamplingBatch of the same rows
    domain  which family of random words: 0 sample, 1 draft proposal, 3 residual
    Returns int32 [n_rows]. A row whose maximum is NaN, inf or -inf gets its argmax, as np.argmax has it: the first NaN,
    the first inf, or token 0. Raises ShapeError.
    """
    tokens = logits.argmax(axis=1).astype(np.int32)
    drawn = np.flatnonzero(~batch.is_greedy)
    rows_at_once = max(1, LOGITS_AT_ONCE // logits.shape[1])
    for i in range(0, len(drawn), rows_at_once):
        rows = drawn[i:i + rows_at_once]
        targets = [target_weights(logits[row], batch, row) for row in rows]
        tokens[rows] = draw(targets, batch.seed[rows], batch.position[rows], domain)
    return tokens


def target_weights(logits, batch, row):
    """The distribution a row's token is drawn from: weight = rint(2**44 * exp((l - max) / T)), then the filters.

    The one definition, for plain decoding and for verification. In this order: top-k keeps every weight >= the k-th
    largest; top-p keeps the smallest prefix of what is left, by weight descending then id ascending, whose mass reaches
    top_p of it; min-p keeps weights >= min_p * the largest. A greedy row, and one whose maximum is not finite, is
    one-hot at its argmax.
    logits  [vocab] f32, already edited
    batch   SamplingBatch; row says which of its rows
    Returns the survivors: token [n] i64, ascending, and weight [n] i64, 1 .. 2**44, exact in float32, not normalised;
    the likeliest token always survives and weighs 2**44. Raises ShapeError.
    """
    vocab = len(logits)
    if vocab > MAX_VOCAB:
        raise ShapeError(f"target_weights: logits are [{vocab}], expected vocab <= {MAX_VOCAB}, so that the weights of "
                         "a row sum exactly in 63 bits")
    best = logits.argmax()
    largest = logits[best]
    if batch.is_greedy[row] or not np.isfinite(largest):
        return np.array([best]), np.array([LIKELIEST])
    with np.errstate(over="ignore"):                 # a very negative mask value may become -inf, which is as good
        x = (logits - largest) * batch.inverse_temperature[row]
    top_k, top_p, least_weight = int(batch.top_k[row]), int(batch.top_p[row]), int(batch.least_weight[row])

    least_x = LEAST_X
    if 0 < top_k < vocab:                            # a first, rough top-k spares exp most of the vocabulary
        least_x = max(least_x, np.partition(x, vocab - top_k)[vocab - top_k] - TIE_MARGIN)
    token = np.flatnonzero(x >= least_x)
    weight = _in_blocks(lambda i: np.rint(exp_f32(x[token[i]]) * LIKELIEST_F32).astype(np.int64), len(token))

    if 0 < top_k < len(token):
        keep = weight >= np.partition(weight, len(token) - top_k)[len(token) - top_k]
        token, weight = token[keep], weight[keep]
    if top_p < TOP_P_ONE:
        keep = _smallest_prefix(weight, -(-int(weight.sum()) * top_p >> 32))     # rounded up, in Python's integers
        token, weight = token[keep], weight[keep]
    if least_weight > 1:
        keep = weight >= least_weight
        token, weight = token[keep], weight[keep]
    return token, weight


def _smallest_prefix(weight, target):
    """Which weights [n] to take, largest first and earliest first, until they sum to target. Returns bool [n]."""
    for shift in (7, 14, WEIGHT_BITS):               # a few tokens hold most mass: sort only as deep as needed
        head = weight[weight >= LIKELIEST >> shift]
        if head.sum() >= target:
            break
    descending = np.sort(head)[::-1]
    n_kept = np.searchsorted(np.cumsum(descending), target) + 1
    least = descending[n_kept - 1]
    keep = weight > least
    tied = np.flatnonzero(weight == least)
    keep[tied[:n_kept - np.count_nonzero(keep)]] = True
    return keep


def draw(targets, seed, position, domain=0):
    """token = argmin over a row's survivors of E_token / weight, in float32, the lowest id on ties.

    targets   one (token, weight) per row, as target_weights returns them
    seed      [n_rows] u64
    position  [n_rows] i64, absolute index of the token being decided
    Returns n_rows token ids. E and its random words: engine/random.py.
    """
    ends = list(itertools.accumulate(len(token) for token, _ in targets))
    token = np.concatenate([token for token, _ in targets])
    if ends[-1] == len(targets):                     # one survivor a row: nothing to draw
        return token
    weight = np.concatenate([weight for _, weight in targets]).astype(np.float32)
    row = np.repeat(np.arange(len(targets)), [len(token) for token, _ in targets])
    times = _in_blocks(lambda i: exponential(token_words(token[i], row[i], seed, position, domain)) / weight[i],
                       len(token))
    return [token[a + times[a:b].argmin()] for a, b in zip([0, *ends], ends, strict=False)]


def _in_blocks(function, n):
    """function(slice) over 0 .. n, a block at a time: its temporaries stay in cache, which is three times faster."""
    return np.concatenate([function(slice(i, i + BLOCK)) for i in range(0, n, BLOCK)])


def top_logprobs(logits, chosen, n):
    """Log-softmax of raw logits: at the chosen tokens, and the n largest.

    logits  [n_rows, vocab] f32, before edits and temperature
    chosen  [n_rows] int
    n       0 .. vocab
    Returns (chosen_logprob [n_rows] f32, top_ids [n_rows, n] i32, top_logprobs [n_rows, n] f32), likeliest first, the
    lowest id first on ties, NaN last. A row whose maximum is NaN, inf or -inf gets NaN.
    """
    n_rows = len(logits)
    chosen_logprob = np.empty(n_rows, np.float32)
    ids, logprobs = np.empty((n_rows, n), np.int32), np.empty((n_rows, n), np.float32)
    for i, row in enumerate(logits):                 # one row at a time: a prompt's logits are large without copies
        largest = row.max()
        with np.errstate(invalid="ignore"):          # all -inf: NaN, as softmax has no answer
            shift = largest + np.log(np.exp(row - largest).sum())
            chosen_logprob[i] = row[chosen[i]] - shift
            if n:
                ids[i] = _largest(row, n)
                logprobs[i] = row[ids[i]] - shift
    return chosen_logprob, ids, logprobs


def _largest(row, n):
    """Indices of the n largest, as a stable sort has them: the first of equals first, NaN last."""
    descending = -row
    head = np.flatnonzero(~(descending > np.partition(descending, n - 1)[n - 1]))
    return head[np.argsort(descending[head], kind="stable")[:n]]
