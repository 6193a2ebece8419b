"""What is done with the logits of a sequence: Generation turns them into text, Probe hands them to the caller."""

from time import perf_counter

import numpy as np

from engine.outputs import RequestMetrics, RequestOutput
from engine.text_edits import TextEdits


class Generation:
    """One request that generates: its text so far, and why it ended.

    prompt_ids    token ids of the prompt
    seed          64-bit, of its draws
    eos_ids       the model's end-of-text ids
    detokenizer   turns ids into text piece by piece, or None
    max_len       tokens a sequence may have, prompt included
    marks         ThinkingMarks, where drafts are judged by the relaxed rule while the model thinks; else None
    """

    samples, hidden = True, None

    def __init__(self, prompt_ids, params, seed, eos_ids, detokenizer, max_len, marks=None):
        self.params, self.seed, self.detokenizer = params, seed, detokenizer
        self.prompt_ids, self.max_len = prompt_ids, max_len
        self._marks = None if params.is_greedy else marks         # a greedy text stays the same
        self._is_thinking = bool(self._marks) and self._marks.after(False, prompt_ids)
        self.stop_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_ids)
        self._edits = TextEdits(params, prompt_ids, banned=self.stop_ids if params.min_tokens else ())
        self.first_logit = 0 if params.prompt_logprobs else len(prompt_ids) - 1
        self.output = RequestOutput(prompt_token_ids=list(prompt_ids), logprobs=[] if params.n_logprobs else None,
                                    prompt_logprobs=[None] if params.prompt_logprobs else None,
                                    metrics=RequestMetrics(n_prompt_tokens=len(prompt_ids)))
        self._submitted = perf_counter()
        self._held = max((len(stop) for stop in params.stop), default=1) - 1    # text that may begin a stop string
        self._n_streamed_ids = self._n_streamed_chars = 0

    @property
    def is_finished(self):
        return self.output.finish_reason is not None

    @property
    def n_wanted(self):
        """Tokens that it may still take."""
        ids = self.output.token_ids
        return min(self.params.max_tokens - len(ids), self.max_len - len(self.prompt_ids) - len(ids))

    def edits(self, drafts=()):
        """What LogitEdits.build takes of the rows that decide the next token and those behind each of `drafts`."""
        return self._edits.rows(drafts, n_banned=self.params.min_tokens - len(self.output.token_ids))

    def rule(self):
        """What SamplingBatch.build takes of the row that decides the next token: draws are keyed by the absolute index
        of the token they decide."""
        return self.params, self.seed, len(self.prompt_ids) + len(self.output.token_ids)

    def relaxed(self, drafts):
        """For each drafted token whether the relaxed rule judges it: where the model thinks, as far as the text and the
        drafts before it say."""
        return self._marks.along(self._is_thinking, drafts) if self._marks else [False] * len(drafts)

    def take(self, tops):
        """Takes, for the next prompt positions, (log-probability of the token that follows, the likeliest of them)."""
        known = self.output.prompt_logprobs
        for top in tops:
            known.append(_logprobs(self.prompt_ids[len(known)], top, self.params.prompt_logprobs))

    def append(self, token, top):
        """Takes the next generated token and decides whether it is the last.

        top  (its log-probability, [(token id, log-probability)] of the likeliest) before edits; read only where
             log-probabilities were asked for
        """
        output, params = self.output, self.params
        if not output.token_ids:
            output.metrics.first_token_s = perf_counter() - self._submitted
        output.token_ids.append(token)
        self._edits.append(token)
        if self._marks:
            self._is_thinking = self._marks.after(self._is_thinking, (token,))
        if params.n_logprobs:
            output.logprobs.append(_logprobs(token, top, params.n_logprobs))
        if token in self.stop_ids:
            self.finish("stop")
        elif self.detokenizer and self._add_text(self.detokenizer.add([token])):
            self.finish("stop", flush=False)
        elif self.n_wanted <= 0:
            self.finish("length")

    def finish(self, reason, flush=True):
        """Ends the request; with `flush`, text held back for want of a whole character comes out now."""
        output = self.output
        if flush and self.detokenizer:
            self._add_text(self.detokenizer.finish())
        output.finish_reason = reason
        output.metrics.n_generated_tokens = len(output.token_ids)
        output.metrics.total_s = perf_counter() - self._submitted

    def piece(self):
        """(text, ids) that may be shown and were not yet."""
        end = max(0, len(self.output.text) - (0 if self.is_finished else self._held))
        text = self.output.text[self._n_streamed_chars:end]
        ids = self.output.token_ids[self._n_streamed_ids:]
        self._n_streamed_chars += len(text)
        self._n_streamed_ids += len(ids)
        return text, ids

    def _add_text(self, piece):
        """Appends text; cuts it at the first stop string and returns whether there was one."""
        output = self.output
        searched = max(0, len(output.text) - self._held)
        output.text += piece
        if len(output.token_ids) <= self.params.min_tokens:
            return False
        found = [at for stop in self.params.stop if (at := output.text.find(stop, searched)) >= 0]
        if found:
            output.text = output.text[:min(found)]
        return bool(found)


class Probe:
    """One row of LLM.forward: collects logits from position `first_logit` on, and hidden states when asked for.

    logits  [n_tokens - first_logit, vocab] float32
    hidden  None, [n_tokens, hidden] or, with all_layers, [n_layers + 1, n_tokens, hidden] float32
    """

    samples = False

    def __init__(self, n_tokens, first_logit, spec, hidden_states):
        self.n_tokens, self.first_logit, self.is_finished = n_tokens, first_logit, False
        self.logits = np.empty((n_tokens - first_logit, spec.vocab), np.float32)
        self.all_layers = hidden_states == "layers"
        shape = (len(spec.layers) + 1, n_tokens, spec.hidden) if self.all_layers else (n_tokens, spec.hidden)
        self.hidden = np.empty(shape, np.float32) if hidden_states else None

    def take(self, position, logits):
        """Keeps the logits of positions position..position + n."""
        self.logits[position - self.first_logit:][:len(logits)] = logits
        self.is_finished = position + len(logits) == self.n_tokens


def _logprobs(token, top, n):
    """{token id: log-probability} of one token and the n likeliest. top: (the token's own, [(id, log-probability)])."""
    own, likeliest = top
    return {token: own, **dict(likeliest[:n])}
