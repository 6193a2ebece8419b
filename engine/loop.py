"""The loop of an engine: schedule → run → sample → append, one step at a time."""

from threading import RLock

from engine.batch import Batch
from engine.sequence import Sequence


class Loop:
    """Runs every submitted sequence to its end, one step at a time; knows nothing of text or files.

    Threads may submit and step at once: one at a time gets in, and whoever does computes for all.

    pad     the id that is looked up at the positions of soft tokens
    unread  ids for which it is looked up wherever they stand
    """

    def __init__(self, runner, scheduler, kv_cache, pad=0, unread=()):
        self.runner, self.scheduler, self.kv_cache, self._pad, self._unread = runner, scheduler, kv_cache, pad, unread
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
                    self._compute(work)
                    self.scheduler.commit(work)
                    for sequence, _ in work:
                        if sequence.task.is_finished:
                            self.scheduler.remove(sequence)
            except BaseException:               # an op failed, or Ctrl-C came anywhere: no page is where we think it is
                self.scheduler.restart()
                self.runner.restart()
                raise

    def _compute(self, work):
        """Runs the model over `work` and gives every task its states, logits and next token."""
        batch = Batch.build(work, self.kv_cache, self._pad, self._unread)
        for (sequence, _), (token, logprobs) in zip(batch.to_sample, self.runner.run(batch), strict=True):
            sequence.tokens.append(token)
            sequence.next_logit += 1
            sequence.task.append(token, logprobs)
