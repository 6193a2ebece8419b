"""The engine computes what transformers computes: logits, hidden states and greedy tokens of the golden checkpoints."""

import shutil

import numpy as np
import pytest

from engine import LLM, SamplingParams
from tests.golden import TEXT_CASES, Golden, assert_logits_close

WHOLE = 2048                # tokens of a step that holds any prompt


@pytest.fixture(scope="module", params=TEXT_CASES)
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="module", params=["whole", "chunk-1", "chunk-7", "chunk-16"])
def llm(request, golden):
    """The engine on the case's checkpoint; prompts go through in one piece, or in chunks of that many tokens."""
    chunk = {"whole": WHOLE, "chunk-1": 1, "chunk-7": 7, "chunk-16": 16}[request.param]
    return LLM(golden.checkpoint, device="cpu", max_batch_tokens=chunk, max_seq_len=512)


def test_logits_of_every_position(llm, golden):
    for i, prompt in enumerate(golden.prompts):
        assert_logits_close(llm.forward([prompt], return_logits="all").logits[0], golden[f"p{i}.logits"])


def test_logits_in_one_ragged_batch(llm, golden):
    for i, logits in enumerate(llm.forward(golden.prompts, return_logits="all").logits):
        assert_logits_close(logits, golden[f"p{i}.logits"])


def test_greedy_tokens_to_the_last(llm, golden):
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=len(golden.greedy(0)))
    for i, output in enumerate(llm.generate(golden.prompts, params)):
        assert output.token_ids == golden.greedy(i)
        if llm.config.max_batch_tokens == WHOLE:
            assert llm.generate(golden.prompts[i], params).token_ids == golden.greedy(i)


def test_hidden_states_of_every_layer(llm, golden):
    k = golden.meta["probe_prompt"]
    result = llm.forward([golden.prompts[k]], return_hidden_states="layers")
    got, expected = result.hidden_states[0], golden[f"p{k}.hidden"]
    assert got.shape == expected.shape
    for j in range(len(expected)):
        assert np.abs(got[j] - expected[j]).max() <= 2e-4 * np.abs(expected[j]).max(), f"layer {j}"
    final = llm.forward([golden.prompts[k]], return_hidden_states=True).hidden_states[0]
    assert np.abs(final - golden[f"p{k}.final_norm"]).max() <= 2e-4 * np.abs(golden[f"p{k}.final_norm"]).max()


def test_a_text_prompt_on_the_12b_layout():
    """Gemma4UnifiedForConditionalGeneration: its image prompts are for later, its one prompt of text runs today."""
    golden = Golden("gemma4-unified")
    i, = (i for i in range(len(golden.prompts)) if not golden[f"p{i}.mm_token_type_ids"].any())
    llm = LLM(golden.checkpoint, device="cpu", max_seq_len=512)
    assert_logits_close(llm.forward([golden.prompts[i]], return_logits="all").logits[0], golden[f"p{i}.logits"])
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=len(golden.greedy(i)))
    assert llm.generate(golden.prompts[i], params).token_ids == golden.greedy(i)


def test_config_as_transformers_writes_it_back(golden, tmp_path):
    """config_v5.json describes the same model as the released config.json: logits are the same bits."""
    resaved = tmp_path / "checkpoint"
    shutil.copytree(golden.checkpoint, resaved)
    shutil.copy(golden.checkpoint / "config_v5.json", resaved / "config.json")
    logits = [LLM(path, device="cpu", max_seq_len=512).forward([golden.prompts[-1]], return_logits="all").logits[0]
              for path in (golden.checkpoint, resaved)]
    np.testing.assert_array_equal(*logits)
