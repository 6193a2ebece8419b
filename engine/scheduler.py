"""Continuous batching: which sequences a step computes, and how many tokens of each."""

from bisect import insort


class Scheduler:
    """Mixes decoding and chunked prefill under `max_batch_tokens`, with at most `max_seqs` sequences at once.

    Decodes come first, then prefills, then waiting sequences, each in order of submission. A running sequence is part
    of every step until it is preempted: at most one is in the middle of its prompt, and new ones get what the others
    leave. When pages run out the newest sequence gives back all of its own and is recomputed later. The oldest one can
    always go on, because the cache holds at least one sequence of the largest length the engine accepts: so every
    sequence finishes.
    """

    def __init__(self, kv_cache, max_seqs, max_batch_tokens):
        self.kv_cache, self.max_seqs, self.max_batch_tokens = kv_cache, max_seqs, max_batch_tokens
        self.waiting, self.running = [], []
        self.n_steps = self.n_preemptions = 0

    def add(self, sequence):
        """Queues a sequence, in submission order."""
        insort(self.waiting, sequence, key=lambda s: s.number)

    def next_batch(self):
        """[(sequence, n tokens)] to compute now, pages reserved; empty when nothing is left to do."""
        self.n_steps += 1
        work, budget = {}, self.max_batch_tokens
        for sequence in sorted(self.running, key=lambda s: (s.n_left > 1, s.number)):
            if budget and sequence in self.running:
                budget -= self._reserve(sequence, min(budget, sequence.n_left), work)
        while budget and self.waiting and len(self.running) < self.max_seqs:
            sequence = self.waiting[0]
            if not self.kv_cache.could_hold(len(sequence.tokens)):
                break
            self.running.append(self.waiting.pop(0))
            budget -= self._reserve(sequence, min(budget, sequence.n_left), work)
        return list(work.items())

    def commit(self, work):
        """Marks a computed batch as cached and gives back the pages its windows have passed."""
        for sequence, n in work:
            sequence.n_cached += n
            self.kv_cache.trim(sequence)

    def remove(self, sequence):
        """Forgets a finished or aborted sequence; its pages are free again."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.kv_cache.release(sequence)

    def restart(self):
        """Forgets what was computed, after a step that did not end: unfinished sequences wait to be recomputed."""
        sequences = sorted({*self.running, *self.waiting}, key=lambda s: s.number)
        self.kv_cache.clear()
        self.running, self.waiting = [], [sequence for sequence in sequences if not sequence.task.is_finished]
        for sequence in sequences:
            sequence.n_cached, sequence.page_lists = 0, self.kv_cache.new_page_lists()

    def _reserve(self, sequence, n, work):
        """Puts up to n tokens of `sequence` into `work`, preempting newer sequences for its first if need be.

        Returns how many; 0 if it was preempted itself. What a preempted sequence had in `work` is given to no other.
        """
        while not (got := self.kv_cache.reserve(sequence, n)):
            newest = max(self.running, key=lambda s: s.number)
            self._preempt(newest)
            work.pop(newest, None)
            if newest is sequence:
                return 0
        work[sequence] = got
        return got

    def _preempt(self, sequence):
        self.kv_cache.release(sequence)
        sequence.n_cached = 0
        sequence.n_preemptions += 1
        self.n_preemptions += 1
        self.running.remove(sequence)
        self.add(sequence)
