"""The rules that judge drafted tokens, in NumPy: the twins of cuda/rejection.cu, and those ops of the `cpu` lane.

A slot is a row whose next token is decided: a sequence with K drafts has K + 1 of them, one behind the other. Its
tokens are decided as if all drafts before held; accept_drafts then finds out how many do. What a token is drawn from is
sampler.target_weights, for plain decoding, for drafts and for their verification.

With draft_sampling="argmax" the tokens of slots are those of the plain `sample`: a draft holds where it equals its
token, so text with drafts is the text without. With "sample" drafts come from sample_drafts and tokens from
sample_with_drafts: another text of the same distribution. relax_drafts is lossy.
"""

import numpy as np

from engine.random import token_words, uniform
from engine.sampler import LIKELIEST, SamplingBatch, draw, target_weights
from engine.sampling_params import SamplingParams

PLAIN, PROPOSAL, COIN, RESIDUAL = range(4)      # domains of random words
DELTA_ONE = 1 << 32                             # of relax_drafts: delta is counted in units of 2**-32
AT_TEMPERATURE_1 = SamplingBatch.build([(SamplingParams(), 0, 0)])


def probabilities(weight):
    """weight / sum, each rounded to float32 before and after the division. weight [n] i64, as target_weights has it."""
    return weight.astype(np.float32) / weight.sum().astype(np.float32)


def accept_coin(seed, position):
    """The uniform number that decides on the draft of the token at `position`. seed [n] u64, position [n] i64."""
    n = np.arange(len(seed))
    return uniform(token_words(np.zeros_like(n), n, seed, position, COIN))


def residual(token, target_probs, draft_probs):
    """(tokens, weights) that a rejected draft's successor is drawn from: max(target - draft, 0), or, where that is 0
    everywhere, which only rounding can do, the target itself. All [n], over the tokens of the target."""
    rest = target_probs - draft_probs
    if (rest > 0).any():
        return token[rest > 0], rest[rest > 0]
    return token, target_probs


def judge(target, draft, draft_probs, seed, position):
    """What slots with one target, draft and draft distribution emit: the draft, or the residual draw.

    target       (token, weight) of target_weights
    draft        token id >= 0
    draft_probs  [vocab] f32; where it is 0 at the draft, all of it is taken to be there
    seed         [n] u64
    position     [n] i64, absolute index of the token being decided
    Returns [n] token ids. Accepting where coin * draft_prob < target_prob needs no division, and never accepts what the
    target cannot give. Source: arXiv:2211.17192, arXiv:2302.01318.
    """
    token, weight = target
    target_probs, own, others = probabilities(weight), draft_probs[draft], draft_probs[token]
    if not own > 0:
        own, others = np.float32(1), (token == draft).astype(np.float32)
    is_accepted = accept_coin(seed, position) * own < target_probs[token == draft].sum()
    again = draw([residual(token, target_probs, others)] * len(seed), seed, position, RESIDUAL)
    return np.where(is_accepted, draft, again)


# --- ops

def accept_drafts(tokens, drafts, slot_begin, slot_rows, positions, out):
    """How many drafts of each sequence hold, and where it goes on.

    tokens      [n_slots] int32: what each slot emits if the drafts before it hold
    drafts      [n_slots] int32: the draft that the slot checks; -1 in the last slot of a sequence
    slot_begin  [n_seqs + 1] int32: slots of sequence b are slot_begin[b] .. slot_begin[b + 1]
    slot_rows   [n_slots] int32: row of each slot among the states
    positions   [n_seqs] int32: position of each sequence's first slot
    out         Accepted. A sequence without slots gets 0 accepted, token 0, row 0 and its position.
    """
    for b, (begin, end) in enumerate(zip(slot_begin[:-1].tolist(), slot_begin[1:].tolist(), strict=True)):
        differs = np.flatnonzero(tokens[begin:end - 1] != drafts[begin:end - 1])
        n = int(differs[0]) if len(differs) else max(end - 1 - begin, 0)
        out.n_accepted[b] = n
        out.next_token[b], out.state_rows[b] = (tokens[begin + n], slot_rows[begin + n]) if begin < end else (0, 0)
        out.positions[b] = positions[b] + n
        out.context_lens[b] = positions[b] + n + 1


def sample_drafts(logits, batch, out, probs, scratch=None, positions=None, ahead=0):
    """Drafts drawn from their filtered distribution, and that distribution.

    logits     [n, vocab] float32
    batch      SamplingBatch: the target's rules and seeds
    out        [n] int32
    probs      [n, vocab] float32, 0 where a token cannot come; of a greedy row, or one whose maximum is not finite, 1
               at the argmax
    positions  None, or [n] int32: the token at positions + ahead is decided, not at batch.position: where
               drafting goes on is known to the lane alone
    """
    at = batch.position if positions is None else positions.astype(np.int64) + ahead
    for i, row in enumerate(logits):
        token, weight = target_weights(row, batch, i)
        out[i], = draw([(token, weight)], batch.seed[i:i + 1], at[i:i + 1], PROPOSAL)
        probs[i] = 0
        probs[i, token] = probabilities(weight)


def sample_with_drafts(logits, batch, drafts, draft_probs, out, scratch=None, prob_rows=None):
    """What each slot emits, where drafts were drawn by sample_drafts: judge() where there is one, else a plain draw.

    logits       [n_slots, vocab] float32, already edited
    batch        SamplingBatch, a row a slot; a greedy row gives its argmax
    drafts       [n_slots] int32, -1 for none
    draft_probs  [n_prob_rows, vocab] float32, what each draft was drawn from; rows of slots without one are not read
    out          [n_slots] int32
    prob_rows    None, or [n_slots] int32: the row of draft_probs of each slot, else its own
    """
    rows = np.arange(len(drafts)) if prob_rows is None else prob_rows
    for i, (row, draft) in enumerate(zip(logits, drafts.tolist(), strict=True)):
        target, seed, position = target_weights(row, batch, i), batch.seed[i:i + 1], batch.position[i:i + 1]
        out[i], = (draw([target], seed, position, PLAIN) if draft < 0 else
                   judge(target, draft, draft_probs[rows[i]], seed, position))


def relax_drafts(logits, drafts, is_relaxed, top_k, delta, tokens, scratch=None):
    """Lossy: tokens[i] = the draft where it is likely enough, else the argmax.

    logits      [n_slots, vocab] float32, already edited; probabilities are at temperature 1, without filters
    drafts      [n_slots] int32, -1 for none
    is_relaxed  [n_slots] bool; other rows of tokens stay, and those without a draft
    top_k       a draft is likely enough where fewer than so many tokens are likelier,
    delta       0 .. 1, and its probability, which is not 0, is less than the largest by at most this
    tokens      [n_slots] int32, changed in place
    A row whose maximum is not finite gets its argmax. Source: TensorRT-LLM, relaxed acceptance.
    """
    delta = round(delta * DELTA_ONE)
    for i in np.flatnonzero(is_relaxed & (drafts >= 0)):
        row, draft = logits[i], drafts[i]
        token, weight = target_weights(row, AT_TEMPERATURE_1, 0)
        own = int(weight[token == draft].sum())
        is_good = (np.isfinite(row.max()) and own > 0 and np.count_nonzero(row > row[draft]) < top_k
                   and LIKELIEST - own <= int(weight.sum()) * delta >> 32)
        tokens[i] = draft if is_good else row.argmax()
