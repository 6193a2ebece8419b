"""Speculation: what a step does beyond a plain one. Drafts are judged, and the next ones made, on the lane.

A step computes the new tokens of its sequences and their drafts behind them, as if those held. Each slot decides the
token behind its row; the first that differs from its draft is where a sequence goes on, from the state of that row and
with the K and V up to it. From there the draft model writes the next drafts. One array goes back to the host.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from engine.accepted import Accepted
from engine.assistant import DraftInputs
from engine.workspace import Buffers


class Results(NamedTuple):
    """Parts of the one array that a step hands to the host.

    array       all of it, int32
    tokens      [n_slots]: what each slot decides if the drafts before it hold
    n_accepted  [n_seqs]
    drafts      [n_rounds, n_seqs]
    """

    array: object
    tokens: object
    n_accepted: object
    drafts: object

    @classmethod
    def of(cls, array, n_slots, n_seqs, n_rounds):
        """The parts of a flat array that begins with them."""
        ends = n_slots, n_slots + n_seqs, n_slots + n_seqs * (1 + n_rounds)
        return cls(array[:ends[2]], array[:ends[0]], array[ends[0]:ends[1]],
                   array[ends[1]:ends[2]].reshape(n_rounds, n_seqs))


class Speculation:
    """The draft model of an engine at work. Allocates nothing in a step, reads nothing back.

    assistant    Assistant
    max_slots    rows of a step whose next token is decided, at most
    most_drafts  of a sequence
    samples      drafts are drawn from the draft model's distribution, and judged by the ratio rule; else they are its
                 likeliest, and hold where a plain draw gives them
    relaxed      RelaxedRule for slots that ask for it, or None
    """

    def __init__(self, assistant, max_seqs, max_slots, most_drafts, lane, samples=False, relaxed=None):
        self.assistant, self.ops, self._stages = assistant, lane.ops, lane.stages
        self.most_drafts, self._max_seqs, self.samples, self.relaxed = most_drafts, max_seqs, samples, relaxed
        shapes = _shapes(assistant.spec.vocab, max_seqs, max_slots, most_drafts, samples)
        self._buffers = Buffers(shapes, None, lane)
        self._draft_probs = None
        if samples:
            self._draft_probs = self._buffers.rows("draft_probs", most_drafts * max_seqs, assistant.spec.vocab)
        self._counts = lane.to_device(np.arange(max_seqs + 1, dtype=np.int32))

    @staticmethod
    def n_bytes(vocab, max_seqs, max_slots, most_drafts, samples):
        """What its buffers take, beside the Assistant's."""
        return Buffers.n_bytes_of(_shapes(vocab, max_seqs, max_slots, most_drafts, samples), 4) + 4 * (max_seqs + 1)

    def use(self, ops):
        """Launches the ops of that table from now on: the lane's, or one that watches them."""
        self.ops = ops
        self.assistant.use(ops)

    def results(self, n_slots, n_seqs, n_rounds):
        """The Results of a step, views of a buffer."""
        n_values = n_slots + n_seqs * (1 + n_rounds)
        return Results.of(self._buffers.flat("results", n_values), n_slots, n_seqs, n_rounds)

    def choose(self, logits, sampling, slots, tokens, scratch):
        """tokens [n_slots] = what the slots decide, from logits after edits."""
        if self.samples:
            self.ops.sample_with_drafts(logits, sampling, slots.drafts, self._draft_probs, tokens, scratch,
                                        slots.prob_rows)
            return
        self.ops.sample(logits, sampling, tokens, scratch)
        if self.relaxed:
            self.ops.relax_drafts(logits, slots.drafts, slots.is_relaxed, self.relaxed.top_k, self.relaxed.delta,
                                  tokens, scratch)

    def go_on(self, states, slot_rows, slots, results):
        """Judges the drafts and makes the next: results.n_accepted and .drafts, from .tokens.

        states     [n_rows, hidden] after the target's final norm
        slot_rows  [n_slots]: which of them each slot's is
        slots      Slots or StagedSlots
        """
        n_rounds, n_seqs = results.drafts.shape
        flat, assistant = self._buffers.flat, self.assistant
        accepted = Accepted(results.n_accepted, *(flat(name, n_seqs) for name in Accepted._fields[1:]))
        self.ops.accept_drafts(results.tokens, slots.drafts, slots.begin, slot_rows, slots.positions, accepted)
        if not n_rounds:
            return
        state = assistant.workspace.rows("state", n_seqs, states.shape[1])
        self.ops.select_rows(states, accepted.state_rows, state)
        assistant.draft(accepted.next_token, state, self._inputs(slots, accepted), n_rounds, results.drafts,
                        self._chooser(slots, accepted) if self.samples else None)

    def _inputs(self, slots, accepted):
        """The DraftInputs of sequences that stand where `accepted` says."""
        pools = slots.pools
        if self._stages:
            counts = self._counts[:len(accepted.positions) + 1]
            pools = {p: replace(paged, context_lens=accepted.context_lens, cu_seqlens=counts)
                     for p, paged in pools.items()}
        return DraftInputs(accepted.positions, accepted.context_lens,
                           {p: pools[p] for p in self.assistant.attentions})

    def _chooser(self, slots, accepted):
        """Draws drafts: that of round s decides the token 2 + s behind the last position in the cache."""
        n_seqs = len(accepted.positions)

        def choose(s, logits, out):
            probs = self._draft_probs[s * n_seqs:(s + 1) * n_seqs]
            self.ops.sample_drafts(logits, slots.rules, out, probs, self.assistant.workspace.scratch,
                                   accepted.positions, 2 + s)
        return choose


def _shapes(vocab, max_seqs, max_slots, most_drafts, samples):
    """{name: (rows, width, dtype)} of the buffers."""
    shapes = {"results": (max_slots + max_seqs * (1 + most_drafts), 1, np.int32),
              **dict.fromkeys(Accepted._fields[1:], (max_seqs, 1, np.int32))}
    if samples:
        shapes["draft_probs"] = most_drafts * max_seqs, vocab, np.float32
    return shapes
