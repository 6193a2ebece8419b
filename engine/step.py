"""One step on the lane: the model over a batch, the logits somebody asked for, the next tokens, and drafts of more."""

from itertools import groupby
from typing import NamedTuple

from engine.sampler import top_logprobs
from engine.speculative import Results
from engine.workspace import MOST_TOP


class Sampled(NamedTuple):
    """What a step decided.

    slots       [(token, top)] of each row of batch.to_sample; top is None or (log-probability of the token, [(token id,
                log-probability)] of the likeliest)
    n_accepted  of each sequence of batch.decided: how many of its drafts hold
    drafts      what is drafted for each behind that, a list of ids; draft_rows: the rows of their probabilities
    """

    slots: list
    n_accepted: list
    drafts: list
    draft_rows: list


class Step:
    """Runs batches and hands what came of them to the sequences' tasks. What returns to the host is token ids, and the
    states, logits and log-probabilities that were asked for.

    encoder_cache  EncoderCache, where the soft tokens of a batch's pictures are taken from; None for a model of text
    speculation    Speculation, or None without a draft model
    """

    def __init__(self, layers, workspace, lane, stager, graphs, encoder_cache=None, speculation=None):
        self._per_layer_rows = layers.weights.per_layer_rows
        self.layers, self.workspace, self.lane, self.ops = layers, workspace, lane, lane.ops
        self._stager, self.graphs, self.encoder_cache, self.speculation = stager, graphs, encoder_cache, speculation

    def run(self, batch):
        """Computes `batch`; returns what is Sampled."""
        if self._per_layer_rows is not None:
            batch.per_layer_rows = self._per_layer_rows(batch.token_ids)
        with self.lane.running():
            if batch.media:
                batch.media_source = self.encoder_cache.source_of(batch.media)
            if self.graphs.enabled and batch.is_decode and not _wants_logprobs(batch):
                inputs = self._stager.decode(self.graphs.bucket(len(batch.decided)),
                                             self.graphs.draft_bucket(batch.n_drafts), len(batch.edits.token))
                return self._decode(batch, inputs)
            return self._run(batch)

    def restart(self):
        """After a step that did not end: an op may have left its counters anywhere."""
        with self.lane.running():
            self.workspace.clear_counters()

    def _decode(self, batch, inputs):
        """A decode step whose launches are those of every other with the same inputs, so that they can be replayed."""
        results = self._results(inputs.batch.n_tokens, inputs.n_seqs, inputs.n_drafts)

        def launch():
            states = self.layers.run(inputs.batch)
            self._choose(states, inputs.batch, inputs.n_edits > 0, results.tokens)
            if inputs.n_drafts:
                self.speculation.go_on(states, inputs.batch.sample_rows, inputs.batch.slots, results)
        inputs.send(batch)
        self.graphs.run(str(inputs), launch)
        return self._sampled(batch, results)

    def _run(self, batch):
        inputs = self._stager(batch) if self.lane.stages else batch
        states = self._run_layers(batch, inputs)
        most = self.workspace.max_logit_rows
        for at in range(0, len(batch.to_take), most):
            self._take(batch.to_take[at:at + most], states, inputs.take_rows[at:at + most],
                       inputs.take_next[at:at + most])
        return self._sample(batch, states, inputs) if batch.to_sample else Sampled([], [], [], [])

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

    def _results(self, n_slots, n_seqs, n_rounds):
        """The Results of a step, views of one buffer; without drafts they are its tokens."""
        if self.speculation:
            return self.speculation.results(n_slots, n_seqs, n_rounds)
        return Results.of(self.workspace.flat("tokens", n_slots), n_slots, 0, 0)

    def _choose(self, states, inputs, has_edits, tokens):
        """Writes the next tokens of inputs.sample_rows; returns their logits after edits, a buffer."""
        logits = self._logits(states, inputs.sample_rows)
        if has_edits:
            self.ops.apply_edits(logits, inputs.edits)
        if inputs.slots is None:
            self.ops.sample(logits, inputs.sampling, tokens, self.workspace.scratch)
        else:
            self.speculation.choose(logits, inputs.sampling, inputs.slots, tokens, self.workspace.scratch)
        return logits

    def _take(self, wanted, states, rows, following):
        """Hands logits, or the log-probabilities of the tokens that follow, to the tasks of (sequence, row) pairs."""
        logits = self._logits(states, rows)
        n_tops = [sequence.task.params.prompt_logprobs if sequence.task.samples else 0 for sequence, _ in wanted]
        tops = self._top(logits, following, n_tops) if any(n_tops) else None
        host = None if all(n_tops) else self.lane.to_host(logits)
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
        has_edits = len(batch.edits.token) > 0
        results = self._results(len(batch.to_sample), len(batch.decided), batch.n_rounds)
        logits = self._choose(states, inputs, has_edits, results.tokens)
        if batch.n_drafts:
            self.speculation.go_on(states, inputs.sample_rows, inputs.slots, results)
        tops = None
        if _wants_logprobs(batch):
            if has_edits:                                   # they are of the model's own logits
                logits = self._logits(states, inputs.sample_rows)
            n_tops = [sequence.task.params.n_logprobs for sequence, _ in batch.to_sample]
            tops = self._top(logits, results.tokens, n_tops)
        return self._sampled(batch, results, tops)

    def _sampled(self, batch, results, tops=None):
        """Brings Results to the host, which may have room for more sequences and slots than the batch has."""
        n_slots, n_seqs = len(batch.to_sample), len(batch.decided)
        n_rounds, stride = results.drafts.shape
        host = Results.of(self.lane.to_host(results.array), len(results.tokens), stride, n_rounds)
        tokens = host.tokens[:n_slots].tolist()
        slots = list(zip(tokens, tops or [None] * n_slots, strict=True))
        if not batch.n_drafts:
            return Sampled(slots, [0] * n_seqs, [[] for _ in range(n_seqs)], [()] * n_seqs)
        return Sampled(slots, host.n_accepted[:n_seqs].tolist(), host.drafts.T[:n_seqs].tolist(),
                       [range(b, n_rounds * stride, stride) for b in range(n_seqs)])

    def _top(self, logits, chosen, n_tops):
        """[(log-probability of chosen[i], [(token id, log-probability)] of at least the n_tops[i] likeliest)]."""
        n, n_rows = min(max(n_tops), MOST_TOP), len(logits)
        found = (self.workspace.flat("own_logprob", n_rows), self.workspace.rows("top_ids", n_rows, n),
                 self.workspace.rows("top_logprobs", n_rows, n))
        self.ops.top_logprobs(logits, chosen, n, *found, self.workspace.scratch)
        own, ids, values = (self.lane.to_host(array).tolist() for array in found)
        tops = [(p, list(zip(i, v, strict=True))) for p, i, v in zip(own, ids, values, strict=True)]
        if max(n_tops) > MOST_TOP:
            logits, chosen = self.lane.to_host(logits), self.lane.to_host(chosen)
            for i, n in enumerate(n_tops):
                if n > MOST_TOP:                            # only the rows that ask: others keep their bits
                    own, ids, values = (part[0].tolist() for part in top_logprobs(logits[[i]], chosen[[i]], n))
                    tops[i] = own, list(zip(ids, values, strict=True))
        return tops


def _wants_logprobs(batch):
    """Whether log-probabilities are asked for with the tokens that the batch decides."""
    return any(sequence.task.params.n_logprobs for sequence, _, _ in batch.decided)
