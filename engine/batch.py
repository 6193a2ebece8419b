"""Batch: what one step computes, flat over its new tokens and drafts: ids, positions, slots, and where the keys are."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from engine.sampler import LogitEdits, SamplingBatch
from engine.slots import Slots


@dataclass
class PagedBatch:
    """How one pool's attention finds the keys of a ragged batch.

    lists        the rows' PageLists, as of this step
    slots        [n_tokens] int32: page * page_size + offset, where each new token's k and v go
    rows         [(first new token, end, context length)]: the row's new tokens, and how many positions of it are in the
                 cache once they are written
    last_visible [n_tokens] int32: the last position each new token sees, its own or a later one of the same step (image
                 tokens see their whole image); None: no token sees later ones
    first_visible [n_tokens] int32: with last_visible, the first one where the window would begin behind it; None: the
                 window says
    """

    lists: list
    slots: np.ndarray
    rows: list
    page_size: int
    last_visible: np.ndarray | None = None
    first_visible: np.ndarray | None = None
    _extents: dict = field(default_factory=dict)

    @cached_property
    def page_table(self):
        """[n_entries] int32: the pages of every row, one row after the other."""
        return np.frombuffer(bytearray().join([held.pages for held in self.lists]), np.int32)

    @cached_property
    def page_begin(self):
        """[n_seqs] int32: position p of row i is in page_table[page_begin[i] + p // page_size]. May be negative: pages
        that the window has passed have no entry."""
        ends = accumulate((len(held.pages) for held in self.lists), initial=0)
        return np.array([end - held.first for end, held in zip(ends, self.lists, strict=False)], np.int32)

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
        def of(visible):
            return None if visible is None else np.concatenate(
                [visible[end - (b - a):end] for (_, end, _), (a, b, _) in zip(self.rows, rows, strict=True)])
        return replace(self, rows=rows, last_visible=of(self.last_visible), first_visible=of(self.first_visible))

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
            pages, first, size = self.lists[i].pages.tolist(), self.lists[i].first, self.page_size
            breaks = [0, *(j for j in range(1, len(pages)) if pages[j] != pages[j - 1] + 1), len(pages)]
            self._extents[i] = [((first + a) * size, pages[a] * size, (b - a) * size) for a, b in pairwise(breaks)]
        return self._extents[i]


@dataclass
class Batch:
    """One step, flat over the new tokens of its sequences; a sequence's drafts are the last of its new tokens.

    token_ids, positions  [n_tokens] int32; the id at a soft token is the one that is looked up there
    pools                 one PagedBatch per KV pool
    kept                  [n_kept] int32: the rows whose final states somebody wants, or None for all. A prompt's other
                          rows are there for their k and v, and are dropped once those are in the cache
    spans                 [(sequence, first kept row, end, context length)]: whose the kept rows are, the last so many
                          new tokens of each sequence
    to_take, to_sample    [(sequence, kept row)]: where the logits of a prompt position, or a next token, are wanted.
                          With K drafts K + 1 rows of to_sample are a sequence's, its slots: each decides the token
                          behind its own as if the drafts before it held
    decided               [(sequence, its first slot, n drafts)]: whose the rows of to_sample are
    take_next             [n_take] int32: the token after each position of to_take, or 0
    edits, sampling       LogitEdits and SamplingBatch of the rows of to_sample
    per_layer_rows        [n_tokens, n_layers * per_layer_input]: the tokens' rows of the second embedding table, where
                          it stays on the host; else None
    media                 [(sequence, picture, first, end)]: soft tokens first..end of the picture are in the step
    media_rows            [n_media] int32: the rows of those soft tokens, in the order of `media`; None without any
    media_source          [n_media] int32: their rows in the encoder's cache, known once all pictures are in there
    slots                 Slots, where there are drafts to judge or to make
    n_wanted              tokens to draft behind what is decided, of each of `decided`; () without a draft model
    """

    token_ids: np.ndarray
    positions: np.ndarray
    pools: tuple
    kept: np.ndarray | None
    spans: list
    to_take: list
    take_next: np.ndarray
    to_sample: list
    edits: LogitEdits
    sampling: SamplingBatch
    per_layer_rows: np.ndarray | None = None
    media: list = field(default_factory=list)
    media_rows: np.ndarray | None = None
    media_source: np.ndarray | None = None
    decided: list = field(default_factory=list)
    slots: Slots | None = None
    n_wanted: tuple = ()

    @classmethod
    def build(cls, work, kv_cache, pad=0, unread=(), wanted=None):
        """The arrays for `work`, [(sequence, n new tokens)] with pages reserved, in that order, and for the sequences'
        drafts. Plain lists first: most steps are a few tokens.

        pad     the id that is looked up at soft tokens
        unread  ids for which pad is looked up wherever they stand
        wanted  wanted(sequence) says how many tokens to draft next; None without a draft model
        """
        size = kv_cache.page_size
        keep_all = any(sequence.task.hidden is not None for sequence, _ in work)
        token_ids, positions, rows, kept, spans, media = [], [], [], [], [], []
        for sequence, n in work:
            assert not sequence.drafts or n == sequence.n_left, "drafts behind tokens that are not computed"
            begin, known, n_drafts = sequence.n_cached, sequence.n_cached + n, len(sequence.drafts)
            end = known + n_drafts
            media += ((len(token_ids) - begin, sequence, run, max(begin, run.begin), min(end, run.end))
                      for run in sequence.media if run.begin < end and begin < run.end)
            rows.append((len(token_ids), len(token_ids) + end - begin, end))
            token_ids += sequence.tokens[begin:known]
            token_ids += sequence.drafts
            positions += range(begin, end)
            n_kept = n_drafts + (n if keep_all else min(n, max(0, known - sequence.next_logit)))
            spans.append((sequence, len(kept), len(kept) + n_kept, end))
            kept += range(len(token_ids) - n_kept, len(token_ids))
        token_ids, positions = np.array(token_ids, np.int32), np.array(positions, np.int32)
        for token in unread:
            token_ids[token_ids == token] = pad
        media_rows = last_visible = first_visible = None
        if media:
            media, media_rows, last_visible, first_visible = _soft_tokens(media, token_ids, positions, pad)
        pools = []
        for p in range(len(kv_cache.specs)):
            lists = [sequence.page_lists[p].copy() for sequence, _ in work]
            slots = [held.pages[at // size - held.first] * size + at % size
                     for held, (first, last, context) in zip(lists, rows, strict=True)
                     for at in range(context - (last - first), context)]
            spec = kv_cache.specs[p]
            pools.append(PagedBatch(lists, np.array(slots, np.int32), rows, size,
                                    last_visible if spec.sees_blocks else None,
                                    first_visible if spec.sees_whole_blocks else None))
        to_take, following, to_sample, decided, numbers = [], [], [], [], []
        for i, (sequence, _, end, context) in enumerate(spans):     # the state of position p is row end - (context - p)
            n_drafts = len(sequence.drafts)
            known = context - n_drafts
            samples = sequence.task.samples and known == len(sequence.tokens)
            if samples:
                numbers.append(i)
                decided.append((sequence, len(to_sample), n_drafts))
                to_sample += ((sequence, row) for row in range(end - n_drafts - 1, end))
            to_come = range(sequence.next_logit, known - samples)
            to_take += ((sequence, end - (context - p)) for p in to_come)
            following += (sequence.tokens[p + 1] if p + 1 < len(sequence.tokens) else 0 for p in to_come)
        edits = LogitEdits.build(row for sequence, _, _ in decided for row in sequence.task.edits(sequence.drafts))
        rules = SamplingBatch.build(sequence.task.rule() for sequence, _, _ in decided)
        sampling = rules.along([n + 1 for _, _, n in decided]) if len(to_sample) > len(decided) else rules
        slots = None
        n_wanted = tuple(wanted(sequence) for sequence, _, _ in decided) if wanted else ()
        if any(n_wanted) or len(to_sample) > len(decided):
            paged = {p: PagedBatch([pool.lists[i] for i in numbers], None, [], size) for p, pool in enumerate(pools)}
            slots = Slots.build(decided, numbers, rules, paged)
        return cls(token_ids, positions, tuple(pools),
                   None if len(kept) == len(token_ids) else np.array(kept, np.int32), spans, to_take,
                   np.array(following, np.int32), to_sample, edits, sampling, media=media, media_rows=media_rows,
                   decided=decided, slots=slots, n_wanted=n_wanted)

    @property
    def n_tokens(self):
        return len(self.token_ids)

    @property
    def kept_rows(self):
        """The rows of `pools`, over the kept tokens."""
        return [(begin, end, context) for _, begin, end, context in self.spans]

    @cached_property
    def kept_pools(self):
        """The pools with the kept tokens as their queries."""
        return tuple(pool.keep(self.kept_rows) for pool in self.pools)

    @cached_property
    def take_rows(self):
        """[n_take] int32: the kept rows of to_take."""
        return np.array([row for _, row in self.to_take], np.int32)

    @cached_property
    def sample_rows(self):
        """[n_sample] int32: the kept rows of to_sample."""
        return np.array([row for _, row in self.to_sample], np.int32)

    @property
    def n_drafts(self):
        """The most drafts that a sequence has, or wants next."""
        return max(self.n_rounds, 0 if self.slots is None else self.slots.most_drafts)

    @property
    def n_rounds(self):
        """How many tokens to draft for all sequences: what the one that wants most wants."""
        return max(self.n_wanted, default=0)

    @property
    def is_decode(self):
        """Whether every row is a token of text, or a draft, whose successor is decided, and nothing else is wanted."""
        return len(self.to_sample) == self.n_tokens and not self.to_take and not self.media and all(
            sequence.task.hidden is None for sequence, _, _ in self.decided)


def _soft_tokens(runs, token_ids, positions, pad):
    """(media, media_rows, last_visible, first_visible) of a Batch and its PagedBatches, whose token_ids become `pad` at
    soft tokens.

    runs  [(row of position 0, sequence, MediaRun, begin, end)]: positions begin..end of the run are in the step
    """
    media, media_rows, last_visible, first_visible = [], [], positions.copy(), positions.copy()
    for row, sequence, run, begin, end in runs:
        media.append((sequence, run.picture, begin - run.begin, end - run.begin))
        media_rows.append(np.arange(row + begin, row + end, dtype=np.int32))
        token_ids[row + begin:row + end] = pad
        last_visible[row + begin:row + end] = run.end - 1
        first_visible[row + begin:row + end] = run.begin
    return media, np.concatenate(media_rows), last_visible, first_visible
