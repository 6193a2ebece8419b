"""Continuous batching: which sequences a step computes, and how many tokens of each."""

from bisect import insort


class Scheduler:
    """Mixes decoding and chunked prefill under `max_batch_tokens`, with at most `max_seqs` sequences at once.

    Decodes come first, then prefills, then waiting sequences, each in order of submission. A running sequence is part
    of every step until it is preempted: at most one is in the middle of its prompt, and new ones get what the others
    leave. When pages run out the newest sequence gives back all of its own and is recomputed later. The oldest one can
    always go on, because the cache holds at least one sequence of the largest length the engine accepts: so every
    sequence finishes.

    A decoding sequence has one known token left, and maybe drafts behind it, which take tokens of the step and pages as
    any others. They get what is left over once every decode has its token and prompts have theirs, but at least half of
    what the decodes leave; where that is too little, equal shares. The rest of the drafts are dropped: they cost nobody
    his place in the step, and no page of his.

    Where layers see all of a picture, its run of soft tokens is never split: a chunk ends before it, or begins at it or
    earlier and holds all of it. A run longer than what a step has left grows past max_batch_tokens, up to
    `max_step_tokens`, for which memory is laid out. One that a running sequence has come to always fits there: only
    decodes, fewer than max_seqs, are before it. For the same reason the oldest sequence finds pages for a whole run.

    max_step_tokens  tokens of a step at most: max_batch_tokens, or max_seqs and the longest run where that is more
    encoder_cache    the EncoderCache whose entries sequences hold as long as their pages; None for a model of text
    """

    def __init__(self, kv_cache, max_seqs, max_batch_tokens, max_step_tokens=None, encoder_cache=None):
        self.kv_cache, self.max_seqs, self.max_batch_tokens = kv_cache, max_seqs, max_batch_tokens
        self.max_step_tokens = max_step_tokens or max_batch_tokens
        self.encoder_cache = encoder_cache
        self.waiting, self.running = [], []
        self.n_steps = self.n_preemptions = 0
        self._keeps_runs_whole = any(pool.sees_blocks for pool in kv_cache.specs)

    def add(self, sequence):
        """Queues a sequence, in submission order."""
        insort(self.waiting, sequence, key=lambda s: s.number)

    def next_batch(self):
        """[(sequence, n known tokens)] to compute now, pages reserved, also for the drafts that each sequence still
        has; empty when nothing is left to do."""
        self.n_steps += 1
        work, budget = {}, self.max_batch_tokens
        by_age = sorted(self.running, key=lambda s: s.number)
        for sequence in by_age:
            if sequence.n_left == 1 and budget > 0 and sequence in self.running:
                budget = self._reserve(sequence, budget, work)
        budget -= min(budget // 2, sum(len(sequence.drafts) for sequence in work))
        for sequence in by_age:
            if sequence.n_left > 1 and budget > 0 and sequence in self.running:
                budget = self._reserve(sequence, budget, work)
        while budget > 0 and self.waiting and len(self.running) < self.max_seqs:
            sequence = self.waiting[0]
            if not self._fits(sequence, budget, sum(work.values())):
                break
            self.running.append(self.waiting.pop(0))
            budget = self._reserve(sequence, budget, work)
        self._add_drafts(work)
        return list(work.items())

    def commit(self, work):
        """Marks tokens, [(sequence, n)], as cached for good, and gives back the pages that the windows have passed and
        those of rejected drafts."""
        for sequence, n in work:
            sequence.n_cached += n
            self.kv_cache.trim(sequence)

    def remove(self, sequence):
        """Forgets a finished or aborted sequence; what it held is free again."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)

    def restart(self):
        """Forgets what was computed, after a step that did not end: unfinished sequences wait to be recomputed."""
        sequences = sorted({*self.running, *self.waiting}, key=lambda s: s.number)
        self.kv_cache.clear()
        if self.encoder_cache:
            self.encoder_cache.clear()
        self.running, self.waiting = [], [sequence for sequence in sequences if not sequence.task.is_finished]
        for sequence in sequences:
            sequence.n_cached, sequence.page_lists, sequence.drafts = 0, self.kv_cache.new_page_lists(), []

    def _reserve(self, sequence, budget, work):
        """Puts tokens of `sequence` into `work`, about as many as the budget, preempting newer sequences for its first
        if need be. What a preempted sequence had in `work` is given to no other.

        Returns what is left of the budget: nothing where the sequence is not through with its prompt.
        """
        n = self._chunk(sequence, min(budget, sequence.n_left), grows=True)
        while not (got := self._chunk(sequence, min(n, max(0, self.kv_cache.room(sequence))))):
            newest = max(self.running, key=lambda s: s.number)
            self._preempt(newest)
            work.pop(newest, None)
            if newest is sequence:
                return budget
        work[sequence] = self.kv_cache.reserve(sequence, got)
        return budget - got if got == sequence.n_left else 0

    def _add_drafts(self, work):
        """Gives the drafts of sequences in `work` what is left of the step and of the pages; others are dropped."""
        left = max(0, self.max_batch_tokens - sum(work.values()))
        drafting = sorted((sequence for sequence in work if sequence.drafts), key=lambda s: len(s.drafts))
        for i, sequence in enumerate(drafting):
            n = min(len(sequence.drafts), left // (len(drafting) - i))
            n = self.kv_cache.reserve(sequence, work[sequence] + n) - work[sequence]
            del sequence.drafts[n:]
            left -= n

    def _chunk(self, sequence, n, grows=False):
        """The next n tokens of `sequence`, or fewer where the end would split a run: that begins the next chunk. A run
        that begins this one is taken whole if the chunk `grows`, and else not at all."""
        end = sequence.n_cached + n
        for run in sequence.media if self._keeps_runs_whole else ():
            if run.begin < end < run.end:
                return (run.end if grows and run.begin <= sequence.n_cached else run.begin) - sequence.n_cached
        return n

    def _fits(self, sequence, budget, n_others):
        """Whether a waiting sequence may begin now: there are pages, and room in the step, beside n_others tokens, for
        a run at its start."""
        n = self._chunk(sequence, min(budget, sequence.n_left), grows=True)
        longest_run = max((run.end - run.begin for run in sequence.media), default=1) if self._keeps_runs_whole else 1
        return (n <= self.max_step_tokens - n_others
                and self.kv_cache.could_hold(len(sequence.tokens), longest_run))

    def _preempt(self, sequence):
        self._release(sequence)
        sequence.n_cached, sequence.drafts = 0, []
        sequence.n_preemptions += 1
        self.n_preemptions += 1
        self.running.remove(sequence)
        self.add(sequence)

    def _release(self, sequence):
        self.kv_cache.release(sequence)
        if self.encoder_cache:
            self.encoder_cache.release(sequence)
