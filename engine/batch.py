"""Batch: what one step computes, as flat int32 arrays: tokens, positions, slots, page tables, offsets."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np


@dataclass
class PagedBatch:
    """How one pool's attention finds the keys of a ragged batch.

    page_table   [n_seqs, most pages held] int32; row i column j holds positions from (first_page[i] + j) * page_size on
    first_page   [n_seqs] int32
    slots        [n_tokens] int32: page * page_size + offset, where each new token's k and v go
    cu_seqlens   [n_seqs + 1] int32: row i's new tokens are cu_seqlens[i]..cu_seqlens[i + 1]
    context_lens [n_seqs] int32: positions of row i in the cache once its new tokens are written
    """

    page_table: np.ndarray
    first_page: np.ndarray
    slots: np.ndarray
    cu_seqlens: np.ndarray
    context_lens: np.ndarray
    page_size: int
    _extents: dict = field(default_factory=dict)

    @cached_property
    def rows(self):
        """[(first new token, end, context length)] as Python ints."""
        offsets = self.cu_seqlens.tolist()
        return list(zip(offsets, offsets[1:], self.context_lens.tolist(), strict=False))

    def runs(self, i, begin, end):
        """Positions begin..end of row i as [(first slot, n)], one entry for each run of neighbouring pages."""
        runs, at = [], begin
        for first, slot, size in self._row_extents(i):
            if first + size > at and at < end:
                n = min(first + size, end) - at
                runs.append((slot + at - first, n))
                at += n
        return runs

    def _row_extents(self, i):
        """Row i's pages as [(first position, first slot, n positions)], neighbours joined."""
        if i not in self._extents:
            first = int(self.first_page[i])
            n_pages = -(-int(self.context_lens[i]) // self.page_size) - first
            pages = self.page_table[i, :n_pages]
            starts = [0, *(np.flatnonzero(np.diff(pages) != 1) + 1).tolist(), n_pages]
            self._extents[i] = [((first + a) * self.page_size, int(pages[a]) * self.page_size,
                                 (b - a) * self.page_size) for a, b in pairwise(starts)]
        return self._extents[i]


@dataclass
class Batch:
    """One step. `work` is [(sequence, n new tokens)]; the arrays are flat over all new tokens, in that order.

    token_ids, positions  [n_tokens] int32
    pools                 one PagedBatch per KV pool
    """

    work: list
    token_ids: np.ndarray
    positions: np.ndarray
    pools: tuple

    @classmethod
    def build(cls, work, kv_cache):
        """The arrays for `work`, whose pages are already reserved."""
        size = kv_cache.page_size
        sequences, counts = [sequence for sequence, _ in work], [n for _, n in work]
        starts = [sequence.n_cached for sequence in sequences]
        token_ids = np.array([t for s, n in work for t in s.tokens[s.n_cached:s.n_cached + n]], np.int32)
        cu_seqlens = np.cumsum([0, *counts], dtype=np.int32)
        context_lens = np.array([start + n for start, n in zip(starts, counts, strict=True)], np.int32)
        row = np.repeat(np.arange(len(work), dtype=np.int32), counts)
        positions = np.arange(len(token_ids), dtype=np.int32) + (context_lens - cu_seqlens[1:])[row]
        pools = []
        for p in range(len(kv_cache.specs)):
            table, first = kv_cache.page_table(sequences, p)
            slots = table[row, positions // size - first[row]] * np.int32(size) + positions % size
            pools.append(PagedBatch(table, first, slots, cu_seqlens, context_lens, size))
        return cls(work, token_ids, positions, tuple(pools))

    @property
    def n_tokens(self):
        return len(self.token_ids)
