"""The loop of an engine: schedule → run → sample → append, one step at a time."""

from threading import RLock

from engine.batch import Batch
from engine.sequence import Sequence


class Loop:
    """Runs every submitted sequence to its end, one step at a time; knows nothing of text or files.

    Threads may submit and step at once: one at a time gets in, and whoever does computes for all.

    pad      the id that is looked up at the positions of soft tokens
    unread   ids for which it is looked up wherever they stand
    control  DraftControl, or None without a draft model
    """

    def __init__(self, runner, scheduler, kv_cache, pad=0, unread=(), control=None):
        self.runner, self.scheduler, self.kv_cache, self._pad, self._unread = runner, scheduler, kv_cache, pad, unread
        self.control = control
        self._n_submitted = 0
        self._lock = RLock()

    def submit(self, tokens, task, media=()):
        """Queues token ids, with the MediaRuns of their pictures, for `task` (a Generation or a Probe); returns the
        Sequence."""
        with self._lock:
            self._n_submitted += 1
            sequence = Sequence(self._n_submitted, list(tokens), task, self.kv_cache.new_page_lists(), media)
            self.scheduler.add(sequence)
            return sequence

    def withdraw(self, sequence):
        """Takes a sequence out before its end; does nothing if it has left already."""
        with self._lock:
            if sequence in self.scheduler.running or sequence in self.scheduler.waiting:
                self.scheduler.remove(sequence)

    def step(self):
        """Computes one batch and hands what came of it to the tasks. Does nothing when there is nothing to do: another
        thread may have finished the caller's requests."""
        with self._lock:
            try:
                if work := self.scheduler.next_batch():
                    self.scheduler.commit(self._compute(work))
                    for sequence, _ in work:
                        if sequence.task.is_finished:
                            self.scheduler.remove(sequence)
            except BaseException:               # an op failed, or Ctrl-C came anywhere: no page is where we think it is
                self.scheduler.restart()
                self.runner.restart()
                raise

    def _compute(self, work):
        """Runs the model over `work` and gives every task its states, logits and next tokens. Returns [(sequence, n)]:
        how many more of its tokens are in the cache for good."""
        batch = Batch.build(work, self.kv_cache, self._pad, self._unread, self._wanted(len(work)))
        sampled, n_cached = self.runner.run(batch), dict(work)
        for b, (sequence, slot, n_drafts) in enumerate(batch.decided):
            task, n_accepted = sequence.task, sampled.n_accepted[b]
            n_cached[sequence] += n_accepted
            for i, (token, top) in enumerate(sampled.slots[slot:slot + n_accepted + 1]):
                sequence.tokens.append(token)
                sequence.next_logit += 1
                task.append(token, top)
                if task.is_finished and i < n_accepted:     # whatever would follow is not the request's, nor counted
                    n_drafts = n_accepted = i
                    break
            if self.control:
                self.control.note(sequence, n_drafts, n_accepted)
                n_usable = 0 if task.is_finished else min(batch.n_wanted[b], task.n_wanted - 1)
                sequence.drafts, sequence.draft_rows = sampled.drafts[b][:n_usable], sampled.draft_rows[b]
        return list(n_cached.items())

    def _wanted(self, n_seqs):
        """What says how many tokens to draft for a sequence in a step of so many sequences: no more than can come
        between the tokens that this step and the next decide at least."""
        if self.control is None:
            return None
        return lambda sequence: max(0, min(self.control.n_drafts(sequence.draft_stats, n_seqs),
                                           sequence.task.n_wanted - 2))
