"""A request ends where it would end without drafts, also in the middle of a run of accepted ones: what is behind it is
neither told nor counted."""

from dataclasses import replace

import pytest

from engine import LLM, SamplingParams
from tests import tiny_models as tiny
from tests.speculating import Drafter, assert_all_free, batches_of, oracle, texts
from tests.tiny_draft import write_draft

N_NEW = 24
GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=N_NEW, n_logprobs=1)
PROMPTS = tiny.prompts(5, 9, 4)


@pytest.fixture(scope="module")
def target(checkpoints):
    return checkpoints["gemma4"]


@pytest.fixture(scope="module")
def plain(target):
    return tiny.open_llm(target)


@pytest.fixture(scope="module")
def outputs(plain):
    """What is said without an end; of different tokens, so that each stop id ends it somewhere else."""
    outputs = plain.generate(PROMPTS, GREEDY)
    assert all(len(set(output.token_ids)) > 8 for output in outputs)
    return outputs


@pytest.fixture(scope="module")
def draft(target, tmp_path_factory):
    return write_draft(tmp_path_factory.mktemp("draft") / "draft", target)


def open_with(target, draft, outputs, n_drafts=4, wrong=False, **arguments):
    """An engine whose drafts are what it will say, or never that."""
    llm = LLM(target, draft=draft, n_draft_tokens=n_drafts,
              **{"device": "cpu", "progress": False, "max_seq_len": 96, **arguments})
    Drafter(llm, oracle(outputs, wrong))
    return llm


@pytest.fixture(scope="module")
def knowing(target, draft, outputs):
    return open_with(target, draft, outputs)


def assert_same_end(llm, plain, params, prompts=PROMPTS):
    """The same outputs; returns them."""
    before, drafts = llm.stats()["generated_tokens"], llm.stats()["drafts"]
    got, expected = llm.generate(prompts, params), plain.generate(prompts, params)
    assert texts(got) == texts(expected)
    n_counted = sum(llm.stats()["drafts"][name] - drafts[name] for name in ("steps", "accepted"))
    assert n_counted == sum(len(output.token_ids) for output in expected)
    assert [len(output.logprobs) for output in got] == [len(output.token_ids) for output in got]
    assert llm.stats()["generated_tokens"] - before == sum(len(output.token_ids) for output in expected)
    assert_all_free(llm)
    return got


@pytest.mark.parametrize("at", range(1, 12))
def test_a_stop_id_at_every_slot(knowing, plain, outputs, at):
    """Runs of five tokens, drafts and the one behind them: two rounds, and so every slot of a run."""
    token = outputs[0].token_ids[at]
    (output, _) = assert_same_end(knowing, plain, replace(GREEDY, stop_token_ids=(token,)))
    assert output.finish_reason == "stop" and output.token_ids[-1] == token


@pytest.mark.parametrize("at", range(1, 12, 2))
def test_the_models_own_end_of_text(target, draft, plain, outputs, at, monkeypatch):
    """eos at a slot, unless the request ignores it or has not its least length."""
    token = outputs[0].token_ids[at]
    llm = open_with(target, draft, outputs)
    for one in (llm, plain):
        monkeypatch.setattr(one, "eos_ids", (token,))
    ends = replace(GREEDY, ignore_eos=False)
    assert assert_same_end(llm, plain, ends)[0].finish_reason == "stop"
    assert assert_same_end(llm, plain, GREEDY)[0].finish_reason == "length"
    assert_same_end(llm, plain, replace(ends, min_tokens=at + 3))


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_max_tokens_inside_a_run(knowing, plain, max_tokens):
    (output, _) = assert_same_end(knowing, plain, replace(GREEDY, max_tokens=max_tokens))
    assert output.finish_reason == "length" and len(output.token_ids) == max_tokens


@pytest.mark.parametrize("n_drafts", [1, 4, 16])
@pytest.mark.parametrize("n_left", [1, 2, 3, 6, 7])
def test_the_longest_sequence_inside_a_run(target, draft, outputs, n_drafts, n_left):
    """It ends at max_seq_len, and no row of a step lies beyond: drafts are what is known to fit."""
    longest = len(PROMPTS[0]) + n_left
    plain = tiny.open_llm(target, max_seq_len=longest)
    llm = open_with(target, draft, outputs, n_drafts, max_seq_len=longest)
    seen = batches_of(llm, lambda batch, sampled: int(batch.positions.max()))
    assert_same_end(llm, plain, GREEDY, PROMPTS[:1])
    assert max(seen) <= longest - 2                             # the last token's K and V are never needed


@pytest.mark.parametrize("at, n", [(3, 1), (5, 2), (9, 3)])
def test_a_stop_string_across_two_runs(knowing, plain, outputs, at, n):
    """Its text is cut where the string begins, wherever among runs of accepted drafts its pieces came."""
    pieces = plain.tokenizer
    before, after = (pieces.decode(outputs[0].token_ids[:i]) for i in (at, at + n))
    stop = after[len(before):]
    assert stop
    output = assert_same_end(knowing, plain, replace(GREEDY, stop=(stop,)))[0]
    assert output.finish_reason == "stop" and stop not in output.text


def test_a_stream_says_no_more_than_the_output(knowing, plain, outputs):
    params = replace(GREEDY, stop_token_ids=(outputs[0].token_ids[7],))
    expected, pieces = plain.generate(PROMPTS[0], params), list(knowing.stream(PROMPTS[0], params))
    assert [token for piece in pieces for token in piece.token_ids] == expected.token_ids
    assert "".join(piece.text for piece in pieces) == expected.text
    assert max(len(piece.token_ids) for piece in pieces) == 5
    assert pieces[-1].finish_reason == "stop" and len(pieces) < len(expected.token_ids)


def test_an_aborted_stream_leaves_nothing_behind(knowing, outputs):
    stream = knowing.stream(PROMPTS[0], GREEDY)
    next(stream), next(stream)
    assert any(sequence.drafts for sequence in knowing.scheduler.running)
    stream.close()
    assert_all_free(knowing)


@pytest.mark.parametrize("n_drafts", [1, 2, 4, 8, 16])
def test_no_draft_is_made_that_cannot_be_used(target, draft, outputs, n_drafts):
    """Where all hold, the steps are as few as can be, and no drafted token is judged in vain."""
    llm = open_with(target, draft, outputs, n_drafts)
    seen = batches_of(llm, lambda batch, sampled: len(batch.to_sample))
    assert texts(llm.generate(PROMPTS[:1], GREEDY)) == texts(outputs[:1])
    assert sum(seen) == N_NEW and len(seen) == 1 + -(-(N_NEW - 1) // (n_drafts + 1))
    stats = llm.stats()["drafts"]
    assert stats["accepted"] == stats["drafted"] == N_NEW - len(seen)
