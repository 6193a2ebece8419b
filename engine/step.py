"""One step on the lane: the model over a batch, the logits somebody asked for, and the next tokens."""

from itertools import groupby

from engine.sampler import top_logprobs
from engine.workspace import MOST_TOP


class Step:
    """Runs batches and hands what came of them to the sequences' tasks. What returns to the host is token ids, and the
    states, logits and log-probabilities that were asked for."""

    def __init__(self, layers, workspace, lane, stager, graphs):
        self.layers, self.workspace, self.lane, self.ops = layers, workspace, lane, lane.ops
        self._stager, self.graphs, self._decode_inputs = stager, graphs, {}

    def run(self, batch):
        """Computes `batch`; returns what is sampled for each row of batch.to_sample: [(token, top)], where top is None
        or (log-probability of the token, [(token id, log-probability)] of the likeliest)."""
        with self.lane.running():
            if self.graphs.enabled and batch.is_decode and not _most_logprobs(batch):
                inputs = self._decode_inputs_for(len(batch.to_sample))
                if inputs.holds(batch):
                    return self._decode(batch, inputs)
            return self._run(batch)

    def _decode_inputs_for(self, n_seqs):
        bucket = self.graphs.bucket(n_seqs)
        if bucket not in self._decode_inputs:
            self._decode_inputs[bucket] = self._stager.decode(bucket)
        return self._decode_inputs[bucket]

    def _decode(self, batch, inputs):
        """A decode step whose launches are those of every other of its bucket, so that they can be replayed."""
        def launch():
            states = self.layers.run(inputs.batch)
            logits = self._logits(states, inputs.batch.sample_rows)
            self.ops.apply_edits(logits, inputs.batch.edits)
            self.ops.sample(logits, inputs.batch.sampling, self.workspace.flat("tokens", len(logits)),
                            self.workspace.scratch)
        inputs.send(batch)
        self.graphs.run(inputs.batch.n_tokens, launch)
        tokens = self.lane.to_host(self.workspace.flat("tokens", len(batch.to_sample)))
        return [(token, None) for token in tokens.tolist()]

    def _run(self, batch):
        inputs = self._stager(batch) if self.lane.stages else batch
        states = self._run_layers(batch, inputs)
        most = self.workspace.max_logit_rows
        for at in range(0, len(batch.to_take), most):
            self._take(batch.to_take[at:at + most], states, inputs.take_rows[at:at + most],
                       inputs.take_next[at:at + most])
        return self._sample(batch, states, inputs) if batch.to_sample else []

    def _run_layers(self, batch, inputs):
        """The states of the kept rows; probes get theirs."""
        probes = [span for span in batch.spans if span[0].task.hidden is not None]
        def observe(j, residual):
            for sequence, begin, end, context in probes:
                if sequence.task.all_layers:
                    sequence.task.hidden[j, sequence.n_cached:context] = self.lane.to_host(residual[begin:end])
        states = self.layers.run(inputs, observe if any(span[0].task.all_layers for span in probes) else None)
        for sequence, begin, end, context in probes:
            if not sequence.task.all_layers:
                sequence.task.hidden[sequence.n_cached:context] = self.lane.to_host(states[begin:end])
        return states

    def _logits(self, states, rows):
        """Logits [n, vocab] of states[rows], a buffer."""
        picked = self.workspace.rows("logit_states", len(rows), states.shape[1])
        return self.layers.logits(self.ops.select_rows(states, rows, picked))

    def _take(self, wanted, states, rows, following):
        """Hands logits, or the log-probabilities of the tokens that follow, to the tasks of (sequence, row) pairs."""
        logits = self._logits(states, rows)
        n_top = max((s.task.params.prompt_logprobs for s, _ in wanted if s.task.samples), default=None)
        host = self.lane.to_host(logits) if any(not s.task.samples for s, _ in wanted) else None
        tops = None if n_top is None else self._top(logits, following, n_top)
        at = 0
        for sequence, group in groupby(wanted, key=lambda pair: pair[0]):
            n = len(list(group))
            if sequence.task.samples:
                sequence.task.take(tops[at:at + n])
            else:
                sequence.task.take(sequence.next_logit, host[at:at + n])
            sequence.next_logit += n
            at += n

    def _sample(self, batch, states, inputs):
        logits = self._logits(states, inputs.sample_rows)
        has_edits = len(batch.edits.token) > 0
        if has_edits:
            self.ops.apply_edits(logits, inputs.edits)
        tokens = self.workspace.flat("tokens", len(logits))
        self.ops.sample(logits, inputs.sampling, tokens, self.workspace.scratch)
        n_top = _most_logprobs(batch)
        if not n_top:
            return [(token, None) for token in self.lane.to_host(tokens).tolist()]
        if has_edits:                                       # they are of the model's own logits
            logits = self._logits(states, inputs.sample_rows)
        tops = self._top(logits, tokens, n_top)
        return list(zip(self.lane.to_host(tokens).tolist(), tops, strict=True))

    def _top(self, logits, chosen, n):
        """[(log-probability of chosen[i], [(token id, log-probability)] of the n likeliest)] of each row."""
        if n > MOST_TOP:
            found = top_logprobs(self.lane.to_host(logits), self.lane.to_host(chosen), n)
        else:
            found = (self.workspace.flat("own_logprob", len(logits)), self.workspace.rows("top_ids", len(logits), n),
                     self.workspace.rows("top_logprobs", len(logits), n))
            self.ops.top_logprobs(logits, chosen, n, *found, self.workspace.scratch)
        own, ids, values = (self.lane.to_host(array).tolist() for array in found)
        return [(p, list(zip(i, v, strict=True))) for p, i, v in zip(own, ids, values, strict=True)]

    def restart(self):
        """After a step that did not end: an op may have left its counters anywhere."""
        self.workspace.clear_counters()


def _most_logprobs(batch):
    """The most log-probabilities a token that a row of batch.to_sample wants."""
    return max((sequence.task.params.n_logprobs for sequence, _ in batch.to_sample), default=0)
