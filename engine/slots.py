"""Slots: the rows of a step whose next tokens are decided, what drafts they judge, and where drafting goes on."""

from dataclasses import dataclass

import numpy as np

from engine.sampler import SamplingBatch


@dataclass
class Slots:
    """A sequence with K drafts has K + 1 slots, the last so many of its rows; they lie sequence after sequence.

    drafts      [n_slots] int32: the draft that each slot judges, the token behind it; -1 in a sequence's last slot
    begin       [n_seqs + 1] int32: slots of sequence b are begin[b]..begin[b + 1]
    positions   [n_seqs] int32: of each sequence's first slot
    prob_rows   [n_slots] int32: the row of each draft among the probabilities of the last round; 0 without a draft
    is_relaxed  [n_slots] bool: the draft is judged by the relaxed rule
    rules       SamplingBatch of the sequences
    numbers     [n_seqs] int32: of each sequence in the batch
    pools       {number of a KV pool: PagedBatch of the sequences}, of which page lists and page size alone count
    """

    drafts: np.ndarray
    begin: np.ndarray
    positions: np.ndarray
    prob_rows: np.ndarray
    is_relaxed: np.ndarray
    rules: SamplingBatch
    numbers: np.ndarray
    pools: dict

    @classmethod
    def build(cls, decided, numbers, rules, pools):
        """decided: [(sequence, first slot, n drafts)]."""
        drafts, prob_rows, is_relaxed = [], [], []
        for sequence, _, n in decided:
            drafts += (*sequence.drafts, -1)
            prob_rows += (*sequence.draft_rows[:n], 0)
            is_relaxed += (*sequence.task.relaxed(sequence.drafts), False)
        begin = np.array([*(first for _, first, _ in decided), len(drafts)], np.int32)
        positions = [len(sequence.tokens) - 1 for sequence, _, _ in decided]
        return cls(np.array(drafts, np.int32), begin, np.array(positions, np.int32), np.array(prob_rows, np.int32),
                   np.array(is_relaxed, bool), rules, np.array(numbers, np.int32), pools)

    @property
    def most_drafts(self):
        """The most that a sequence has."""
        return int(np.diff(self.begin).max(initial=1)) - 1
