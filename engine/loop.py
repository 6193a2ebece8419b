"""The loop of an engine: schedule → run → sample → append, one step at a time."""

from itertools import groupby
from threading import RLock

from engine.batch import Batch
from engine.sampler import LogitEdits, SamplingBatch, apply_edits, sample
from engine.sequence import Sequence


class Loop:
    """Runs every submitted sequence to its end, one step at a time; knows nothing of text or files.

    Threads may submit and step at once: one at a time gets in, and whoever does computes for all.
    """

    def __init__(self, layers, scheduler, kv_cache, workspace):
        self.layers, self.scheduler, self.kv_cache, self.workspace = layers, scheduler, kv_cache, workspace
        self._n_submitted = 0
        self._lock = RLock()

    def submit(self, tokens, task):
        """Queues token ids for `task` (a Generation or a Probe); returns the Sequence."""
        with self._lock:
            self._n_submitted += 1
            sequence = Sequence(self._n_submitted, list(tokens), task, self.kv_cache.new_page_lists())
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
                raise

    def _compute(self, work):
        """Runs the model over `work` and gives every task its states, logits and next token."""
        batch = Batch.build(work, self.kv_cache)
        spans = [(sequence, *kept) for (sequence, _), kept in zip(work, batch.kept_rows, strict=True)]
        probes = [span for span in spans if span[0].task.hidden is not None]
        states = self.layers.run(batch, _observer(probes) if any(s.task.all_layers for s, *_ in probes) else None)
        for sequence, begin, end, context in probes:
            if not sequence.task.all_layers:
                sequence.task.hidden[sequence.n_cached:context] = states[begin:end]
        to_take, to_sample = [], []
        for sequence, _, end, context in spans:                 # the state of position p is row end - (context - p)
            samples = sequence.task.samples and context == len(sequence.tokens)
            if samples:
                to_sample.append((sequence, end - 1))
            to_take += ((sequence, end - (context - p)) for p in range(sequence.next_logit, context - samples))
        most = self.workspace.max_logit_rows
        for at in range(0, len(to_take), most):
            self._take(to_take[at:at + most], states)
        for at in range(0, len(to_sample), most):
            self._sample(to_sample[at:at + most], states)

    def _take(self, rows, states):
        """Hands the logits of (sequence, row of states) pairs to the tasks that asked for them."""
        logits = self.layers.logits(states[[row for _, row in rows]])
        at = 0
        for sequence, group in groupby(rows, key=lambda pair: pair[0]):
            n = len(list(group))
            sequence.task.take(sequence.next_logit, logits[at:at + n])
            sequence.next_logit += n
            at += n

    def _sample(self, rows, states):
        """Picks and appends the next token of each (sequence, row of states)."""
        tasks = [sequence.task for sequence, _ in rows]
        logits = self.layers.logits(states[[row for _, row in rows]])
        raw = logits.copy() if any(task.params.n_logprobs for task in tasks) else logits
        apply_edits(logits, LogitEdits.build(task.edits() for task in tasks))
        chosen = sample(logits, SamplingBatch.build(task.rule() for task in tasks)).tolist()
        for i, ((sequence, _), token) in enumerate(zip(rows, chosen, strict=True)):
            sequence.tokens.append(token)
            sequence.next_logit += 1
            sequence.task.append(token, raw[i:i + 1])


def _observer(probes):
    """The callback that copies the residual stream into the probes which asked for every layer."""
    def observe(j, residual):
        for sequence, begin, end, context in probes:
            if sequence.task.all_layers:
                sequence.task.hidden[j, sequence.n_cached:context] = residual[begin:end]
    return observe
