"""The engine on the kernels, emulated or (--lane cuda) on a GPU: goldens in bfloat16, log-probabilities, and the plan
of what is taken."""

import numpy as np
import pytest

from engine import SamplingParams
from engine.workspace import MOST_TOP
from tests import tiny_models as tiny
from tests.golden import Golden

# max and median over the positions of a case of transformers' own bfloat16 error (tests/goldens/README.md).
BF16_ERROR = {"gemma3-text": (0.044, 0.018), "gemma3-mm-textonly": (0.057, 0.019), "gemma4-dense": (0.097, 0.022),
              "gemma4-e": (0.096, 0.030)}


def errors(got, expected):
    """Per position: largest difference over the vocabulary, relative to the largest |logit| of the position."""
    return np.abs(got - expected).max(axis=1) / np.abs(expected).max(axis=1)


@pytest.fixture(scope="module", params=BF16_ERROR)
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="module")
def opened(golden, open_llm):
    return open_llm(golden.checkpoint)


def test_golden_logits_are_as_close_as_bfloat16_allows(golden, opened):
    results = opened.forward(golden.prompts, return_logits="all").logits
    pooled = np.concatenate([errors(got, golden[f"p{i}.logits"]) for i, got in enumerate(results)])
    most, median = BF16_ERROR[golden.checkpoint.parent.name]
    assert np.median(pooled) <= 1.5 * median
    assert pooled.max() <= 2 * most


def test_golden_greedy_tokens(golden, opened):
    """Decoding picks what the oracle picked, up to the first step whose two likeliest are nearer than twice the
    observed error; after the oracle's own text, also wherever they are farther apart."""
    n_new = len(golden.greedy(0))
    outputs = opened.generate(golden.prompts, SamplingParams(temperature=0, ignore_eos=True, max_tokens=n_new))
    n_clear = n_equal = 0
    for i, output in enumerate(outputs):
        greedy = golden.greedy(i)
        rows = opened.forward([golden.prompts[i] + greedy[:-1]], return_logits=n_new).logits[0]
        error = np.abs(rows - golden[f"p{i}.decode_logits"]).max(axis=1)
        is_clear = golden[f"p{i}.greedy_gap"] > 2 * error
        n_sure = n_new if is_clear.all() else int(np.argmin(is_clear))
        assert output.token_ids[:n_sure] == greedy[:n_sure]
        is_equal = rows.argmax(axis=1) == greedy
        assert is_equal[is_clear].all()
        n_clear, n_equal = n_clear + is_clear.sum(), n_equal + is_equal.sum()
    n = len(outputs) * n_new
    assert n_clear >= n // 4 and n_equal >= 0.9 * n, f"{n_clear} clear and {n_equal} equal of {n}"


def tiny_prompt(n):
    return np.random.default_rng(n).integers(3, 60, n).tolist()


def test_logprobs_and_hidden_states_come_from_the_lane(checkpoints, open_llm):
    cpu, llm = tiny.open_llm(checkpoints["gemma4"]), open_llm(checkpoints["gemma4"], max_seq_len=64)
    prompt = tiny_prompt(20)
    wanted, got = (one.forward([prompt], return_hidden_states="layers").hidden_states[0] for one in (cpu, llm))
    assert got.shape == wanted.shape and np.abs(got - wanted).max() <= 0.1 * np.abs(wanted).max()
    params = SamplingParams(temperature=0, max_tokens=4, n_logprobs=3, prompt_logprobs=2, ignore_eos=True)
    output = llm.generate(prompt, params)
    logits = llm.forward([prompt + output.token_ids[:-1]], return_logits="all").logits[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for row, found in zip(logprobs[len(prompt) - 1:], output.logprobs, strict=True):
        assert all(abs(row[token] - p) < 1e-5 for token, p in found.items())
        assert set(np.argsort(-row, kind="stable")[:3].tolist()) <= set(found)
    for position, found in enumerate(output.prompt_logprobs[1:]):
        assert prompt[position + 1] in found
        assert all(abs(logprobs[position][token] - p) < 1e-5 for token, p in found.items())


def test_logprobs_do_not_depend_on_how_many_the_neighbours_want(tmp_path, open_llm):
    """Beyond MOST_TOP they are found on the host, but only for the rows that ask."""
    path = tiny.write(tmp_path / "c", "gemma3", with_text=False, vocab_size=MOST_TOP + 100)
    llm = open_llm(path, max_seq_len=32)
    wanted = (3, MOST_TOP, MOST_TOP + 76, 0)
    params = [SamplingParams(temperature=0, max_tokens=3, n_logprobs=n, prompt_logprobs=n, ignore_eos=True)
              for n in wanted]
    prompts = [tiny_prompt(n) for n in (5, 6, 7, 8)]
    together = llm.generate(prompts, params)
    for n, prompt, one, output in zip(wanted, prompts, params, together, strict=True):
        alone = llm.generate(prompt, one)
        assert (alone.logprobs, alone.prompt_logprobs) == (output.logprobs, output.prompt_logprobs)
        assert not n or all(len(found) in (n, n + 1) for found in output.logprobs + output.prompt_logprobs[1:])


@pytest.mark.parametrize("name", ["gemma4", "gemma4-moe", "gemma4-e", "llama4"])
def test_the_plan_counts_what_is_taken(checkpoints, open_llm, name):
    for arguments in ({}, {"max_seqs": 300, "max_batch_tokens": 20}, {"max_seqs": 3, "max_seq_len": 40, "ple": "host"}):
        llm = open_llm(checkpoints[name], **{"max_seq_len": 64, **arguments})
        workspace, stager = llm._core.step.workspace, llm._core.step._stager
        taken = sum(buffer.nbytes for buffer in [*workspace._buffers.values(), *workspace.scratch])
        assert llm.plan().workspace_bytes == taken + stager._buffer.device.nbytes
        assert llm.plan().kv_bytes == sum(pool.nbytes for pool in llm.kv_cache.k + llm.kv_cache.v)
