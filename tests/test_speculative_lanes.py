"""Drafts on the kernels, emulated or (--lane cuda) on a GPU: the logits of slots are plain decoding's, bit for bit."""

import numpy as np
import pytest

from engine import SamplingParams
from tests.golden import Golden
from tests.speculating import CASES, batches_of, open_pair, texts


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def device(request):
    return request.config.getoption("--lane")


def logits_of(llm, prompts, params):
    """(outputs, {(number of the prompt, position): logits after edits of the token that was decided there})."""
    found, vocab = {}, llm.spec.vocab

    def look(batch, sampled):
        with llm.lane.running():
            rows = llm.lane.to_host(llm._core.workspace.rows("logits", len(batch.to_sample), vocab))
        for (sequence, slot, _), n in zip(batch.decided, sampled.n_accepted, strict=True):
            for i in range(n + 1):
                end = len(sequence.tokens) + i
                found[sequence.number, end] = rows[slot + i].view(np.uint32).tobytes()
    batches_of(llm, look)
    return llm.generate(prompts, params), found


@pytest.mark.parametrize("n_drafts", [0, 1, 2, 4, 8, 16])
def test_logits_of_slots_are_those_of_plain_decoding_bit_for_bit(case, device, n_drafts):
    prompts = [prompt[:25] for prompt in Golden(case).prompts[:3]]
    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=10),
              SamplingParams(temperature=0.3, seed=1, ignore_eos=True, max_tokens=9),
              SamplingParams(temperature=0, repetition_penalty=1.2, ignore_eos=True, max_tokens=9, prompt_logprobs=1)]
    (plain, expected), (outputs, got) = (logits_of(open_pair(case, n, device, max_batch_tokens=33), prompts, params)
                                         for n in (None, n_drafts))
    assert texts(outputs) == texts(plain) and outputs[2].prompt_logprobs == plain[2].prompt_logprobs
    assert {key: got.get(key) for key in expected} == expected      # a step may decide more than its request takes


def test_log_probabilities_are_those_of_plain_decoding_bit_for_bit(case, device):
    prompts = [prompt[:25] for prompt in Golden(case).prompts[:2]]
    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=10, n_logprobs=2),
              SamplingParams(temperature=0, repetition_penalty=1.2, ignore_eos=True, max_tokens=9, n_logprobs=3)]
    plain, got = (open_pair(case, n, device).generate(prompts, params) for n in (None, 3))
    assert texts(got) == texts(plain) and [one.logprobs for one in got] == [one.logprobs for one in plain]
