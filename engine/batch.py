"""Batch: what one step computes, flat over its new tokens: ids, positions, slots, and where the keys are."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np


@dataclass
class PagedBatch:
    """How one pool's attention finds the keys of a ragged batch.

    lists        the rows' PageLists, as of this step
    slots        [n_tokens] int32: page * page_size + offset, where each new token's k and v go
    rows         [(first new token, end, context length)]: the row's new tokens, and how many positions of it are in the
                 cache once they are written
    """

    lists: list
    slots: np.ndarray
    rows: list
    page_size: int
    _extents: dict = field(default_factory=dict)

    @cached_property
    def page_table(self):
        """[n_seqs, most pages held] int32, -1 beyond a row's own pages: row i column j holds the positions from
        (first_page[i] + j) * page_size on."""
        table = np.full((len(self.lists), max(len(held.pages) for held in self.lists)), -1, np.int32)
        for row, held in zip(table, self.lists, strict=True):
            row[:len(held.pages)] = held.pages
        return table

    @cached_property
    def first_page(self):
        """[n_seqs] int32: the logical page of column 0."""
        return np.array([held.first for held in self.lists], np.int32)

    @cached_property
    def cu_seqlens(self):
        """[n_seqs + 1] int32: row i's new tokens are cu_seqlens[i]..cu_seqlens[i + 1]."""
        return np.array([0, *(end for _, end, _ in self.rows)], np.int32)

    @cached_property
    def context_lens(self):
        """[n_seqs] int32: positions of each row in the cache once its new tokens are written."""
        return np.array([context for _, _, context in self.rows], np.int32)

    def keep(self, rows):
        """The same sequences with other queries: the last so many new tokens of each."""
        return replace(self, rows=rows)

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
            pages, first, size = self.lists[i].pages, self.lists[i].first, self.page_size
            breaks = [0, *(j for j in range(1, len(pages)) if pages[j] != pages[j - 1] + 1), len(pages)]
            self._extents[i] = [((first + a) * size, pages[a] * size, (b - a) * size) for a, b in pairwise(breaks)]
        return self._extents[i]


@dataclass
class Batch:
    """One step, flat over the new tokens of its sequences.

    token_ids, positions  [n_tokens] int32
    pools                 one PagedBatch per KV pool
    kept                  [n_kept] int32: the rows whose final states somebody wants, or None for all. A prompt's other
                          rows are there for their k and v, so the last layer stops once those are in the cache
    kept_rows             rows of the PagedBatches, over the kept tokens: the last so many new tokens of each sequence
    """

    token_ids: np.ndarray
    positions: np.ndarray
    pools: tuple
    kept: np.ndarray | None
    kept_rows: list

    @classmethod
    def build(cls, work, kv_cache):
        """The arrays for `work`, [(sequence, n new tokens)] with pages reserved, in that order. Plain lists first: most
        steps are a few tokens."""
        size = kv_cache.page_size
        keep_all = any(sequence.task.hidden is not None for sequence, _ in work)
        token_ids, positions, rows, kept, kept_rows = [], [], [], [], []
        for sequence, n in work:
            begin, end = sequence.n_cached, sequence.n_cached + n
            rows.append((len(token_ids), len(token_ids) + n, end))
            token_ids += sequence.tokens[begin:end]
            positions += range(begin, end)
            n_kept = n if keep_all else min(n, max(0, end - sequence.next_logit))
            kept_rows.append((len(kept), len(kept) + n_kept, end))
            kept += range(len(token_ids) - n_kept, len(token_ids))
        pools = []
        for p in range(len(kv_cache.specs)):
            lists = [sequence.page_lists[p].copy() for sequence, _ in work]
            slots = [held.pages[at // size - held.first] * size + at % size
                     for held, (first, last, _) in zip(lists, rows, strict=True) for at in positions[first:last]]
            pools.append(PagedBatch(lists, np.array(slots, np.int32), rows, size))
        return cls(np.array(token_ids, np.int32), np.array(positions, np.int32), tuple(pools),
                   None if len(kept) == len(token_ids) else np.array(kept, np.int32), kept_rows)

    @property
    def n_tokens(self):
        return len(self.token_ids)
