"""Engines with a draft model, and draft models that say what a test wants, on lanes whose arrays are NumPy's."""

import numpy as np

from engine import LLM
from tests.golden import GOLDENS, Golden

CASES = ("gemma4-assistant", "gemma4-assistant-dense")


def open_pair(case, n_drafts=4, device="cpu", **arguments):
    """An LLM of a case of tests/goldens; n_drafts None: without its draft model."""
    more = {} if n_drafts is None else {"draft": GOLDENS / case / "assistant", "n_draft_tokens": n_drafts}
    return LLM(Golden(case).checkpoint, device=device, **{"max_seq_len": 256, "max_seqs": 8, "progress": False, **more,
                                                          **arguments})


def texts(outputs):
    """What of RequestOutputs must not depend on drafts, but for the last bits of log-probabilities."""
    return [(output.token_ids, output.text, output.finish_reason, output.metrics.n_generated_tokens)
            for output in outputs]


def assert_logprobs_close(got, expected, most=6e-4):
    """The same ids with log-probabilities that differ by rounding: the `cpu` lane promises 1e-5 of the largest logit,
    here of 30, for either end of a difference of two."""
    for a, b in zip(got, expected, strict=True):
        for one, other in ((a.logprobs, b.logprobs), (a.prompt_logprobs, b.prompt_logprobs)):
            for x, y in zip(one or (), other or (), strict=True):
                assert (x is None and y is None) or (x.keys() == y.keys() and all(abs(x[i] - y[i]) <= most for i in x))


def assert_all_free(llm):
    """No sequence and no page is left behind."""
    assert not llm.scheduler.running and not llm.scheduler.waiting
    assert all(pages.n_free == pages.n_pages for pages in llm.kv_cache.allocators)


def batches_of(llm, look=lambda batch, sampled: (batch, sampled)):
    """[look(batch, what was Sampled)] of every step from now on."""
    step, seen = llm._core.step, []
    run = step.run

    def watched(batch):
        sampled = run(batch)
        seen.append(look(batch, sampled))
        return sampled
    step.run = watched
    return seen


class Drafter:
    """Stands in for the draft model of an engine.

    says    says(text, n) -> n ids: what is drafted behind the ids of `text`
    logits  logits(text) -> [vocab]: what drafts are chosen by, with draft_sampling="sample"; else None
    """

    def __init__(self, llm, says=None, logits=None):
        self.says, self.logits, self._vocab = says, logits, llm.spec.vocab
        step, assistant = llm._core.step, llm._core.draft
        self._run, self._batch = step.run, None
        step.run, self.real, assistant.draft = self._watched, assistant.draft, self.draft

    def _watched(self, batch):
        self._batch = batch
        return self._run(batch)

    def texts(self, next_token, inputs):
        """What each sequence of the step is known to say, next_token included."""
        known = []
        for (sequence, _, _), token, position in zip(self._batch.decided, next_token, inputs.positions, strict=True):
            n_accepted = int(position) - (len(sequence.tokens) - 1)
            known.append([*sequence.tokens, *sequence.drafts[:n_accepted], int(token)])
        return known

    def draft(self, next_token, states, inputs, n_steps, out, choose=None):
        """As Assistant.draft."""
        known = self.texts(next_token, inputs)
        if self.logits is None:
            out[...] = np.array([self.says(text, n_steps) for text in known]).T
            return
        for s in range(n_steps):
            choose(s, np.stack([self.logits(text) for text in known]).astype(np.float32), out[s])
            for text, token in zip(known, out[s], strict=True):
                text.append(int(token))


def oracle(outputs, wrong=False):
    """says() of a Drafter that knows the texts of finished requests, and else says 0; wrong: never what comes next."""
    known = [output.prompt_token_ids + output.token_ids for output in outputs]

    def says(text, n):
        whole = next((one for one in known if one[:len(text)] == text), text)
        return [token + 1 - 2 * (token > 8) if wrong else token for token in (whole[len(text):] + [0] * n)[:n]]
    return says
