"""Steps with drafts on device "cuda", on a stand-in for CuPy: the emulated lane's tokens, graphs that change nothing,
one copy in, one graph and one read-back a step, and no allocation."""

import numpy as np
import pytest

from engine import SamplingParams
from tests import stand_in
from tests import tiny_models as tiny
from tests.golden import Golden
from tests.speculating import CASES, batches_of, open_pair, texts
from tests.tiny_draft import add_thinking, write_draft

GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=12)
MIXED = [SamplingParams(temperature=0.3, top_p=0.9, repetition_penalty=1.3, seed=1, ignore_eos=True, max_tokens=12),
         SamplingParams(temperature=0.5, top_k=20, seed=2, ignore_eos=True, max_tokens=10, logit_bias={5: 2.0}),
         SamplingParams(temperature=0.1, seed=3, ignore_eos=True, max_tokens=11), GREEDY]
RULES = {"argmax": {}, "sample": {"draft_sampling": "sample"}}


def open_gpu(case, n_drafts, **arguments):
    return open_pair(case, n_drafts, "cuda", **{"max_batch_tokens": 64, **arguments})


def prompts_of(case, n=4):
    return [prompt[:20] for prompt in Golden(case).prompts[:n]]


@pytest.mark.parametrize("case, n_drafts, rule", [
    (CASES[0], 4, "argmax"), (CASES[1], 16, "argmax"), (CASES[0], 3, "sample"), (CASES[1], 4, "sample")])
def test_tokens_are_those_of_the_emulated_lane(gpu, case, n_drafts, rule):
    """Over buckets of sequences and of drafts that fill and shrink. Under "argmax" they are those without drafts."""
    n = 3 + (rule == "argmax")                                  # a bucket that is not full
    prompts, params, more = prompts_of(case, n), MIXED[-n:], RULES[rule]
    expected = texts(open_pair(case, n_drafts, "emulated", max_batch_tokens=64, **more).generate(prompts, params))
    if rule == "argmax":
        assert expected == texts(open_pair(case, None, "emulated").generate(prompts, params))
    llm = open_gpu(case, n_drafts, **more)
    for _ in range(2):
        assert texts(llm.generate(prompts, params)) == expected
    assert not llm.graphs.failures and gpu.counts["replays"] > 0
    assert llm.stats()["drafts"]["accepted"] > 0 or n_drafts == 16


def results_of(llm):
    """What every step from now on decided and drafted, bits of the logits among it."""
    def look(batch, sampled):
        with llm.lane.running():
            logits = llm.lane.to_host(llm._core.workspace.rows("logits", len(batch.to_sample), llm.spec.vocab))
        return logits.view(np.uint32).tobytes(), sampled.slots, sampled.n_accepted, [
            drafts[:n] for drafts, n in zip(sampled.drafts, batch.n_wanted, strict=True)]
    return batches_of(llm, look)


@pytest.mark.parametrize("case, rule", [(CASES[0], "argmax"), (CASES[1], "sample")])
def test_replayed_steps_do_what_eager_ones_do(gpu, case, rule):
    """Bit for bit, drafts too: nothing that differs between steps is in a graph."""
    seen = []
    for graphs in (True, False):
        llm = open_gpu(case, 4, graphs=graphs, **RULES[rule])
        seen.append(results_of(llm))
        llm.generate(prompts_of(case), MIXED)
        llm.generate(prompts_of(case, 3), GREEDY)
        assert (gpu.counts["replays"] > 3) == graphs
        gpu.counts.clear()
        del llm                                                 # two do not fit the stand-in's memory
    assert len(seen[0]) == len(seen[1])
    for replayed, eager in zip(*seen, strict=True):
        assert replayed == eager


@pytest.mark.parametrize("graphs", [True, False])
def test_probabilities_are_of_the_drafts_that_they_are_kept_for(gpu, graphs):
    """A draft has some in the row that is remembered for it, in buckets that are not full too."""
    llm, n_drafts = open_gpu(CASES[0], 3, graphs=graphs, draft_sampling="sample"), []

    def look(batch, sampled):
        with llm.lane.running():
            probs = llm.lane.to_host(llm._core.step.speculation._draft_probs)
        for drafts, rows in zip(sampled.drafts, sampled.draft_rows, strict=True):
            assert (probs[list(rows), drafts] > 0).all()
            assert np.abs(probs[list(rows)].sum(axis=1) - 1).max(initial=0) < 1e-5
            n_drafts.append(len(drafts))
    batches_of(llm, look)
    for _ in range(2):
        llm.generate(prompts_of(CASES[0], 3), MIXED[:3])
    assert max(n_drafts) == 3 and bool(gpu.counts["replays"]) == graphs


def test_the_relaxed_rule_is_in_the_graph(gpu, tmp_path):
    """Which drafts it judges differs from step to step, and so is read on the device."""
    target = tiny.write(tmp_path / "target", "gemma4", vocab_size=104)
    begin, end = add_thinking(target)
    relaxed = {"draft": write_draft(tmp_path / "draft", target), "relaxed_acceptance": {"top_k": 90, "delta": 1.0}}
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=16, ignore_eos=True)
    prompts = [[begin, *tiny.prompts(3, 9)[0]], tiny.prompts(3, 7)[0], [begin, 9, 8, end, 11]]
    plain, emulated, graphed = (
        texts(tiny.open_llm(target, device=device, **more).generate(prompts, params))
        for device, more in (("emulated", {}), ("emulated", relaxed), ("cuda", relaxed)))
    assert emulated == graphed and gpu.counts["replays"] > 0
    assert [a == b for a, b in zip(plain, emulated, strict=True)] == [False, True, True]


def counted(llm):
    """[(is_decode, most drafts judged or made, what was counted)] of every step from now on."""
    step, seen = llm._core.step, []
    run = step.run

    def watched(batch):
        before = stand_in._gpu.counts.copy()
        sampled = run(batch)
        seen.append((batch.is_decode, batch.n_drafts, stand_in._gpu.counts - before))
        return sampled
    step.run = watched
    return seen


@pytest.mark.parametrize("rule", RULES)
def test_a_replayed_step_is_one_copy_one_graph_one_read_back(gpu, rule):
    llm = open_gpu(CASES[0], 4, **RULES[rule])
    for _ in range(2):
        llm.generate(prompts_of(CASES[0]), GREEDY)
    seen = counted(llm)
    llm.generate(prompts_of(CASES[0]), GREEDY)
    decodes = [(n, counts) for is_decode, n, counts in seen if is_decode]
    assert len(decodes) >= 4 and max(n for n, _ in decodes) == 4
    assert all(counts == {"copies in": 1, "replays": 1, "copies out": 1, "waits": 1} for _, counts in decodes), decodes


def test_an_eager_step_allocates_nothing_copies_in_once_and_reads_back_once(gpu):
    """Chunks of prompts beside drafts: other sizes in every step."""
    llm = open_gpu(CASES[1], 4, graphs=False, max_batch_tokens=17)
    llm.generate(prompts_of(CASES[1]), GREEDY)
    seen = counted(llm)
    llm.generate(prompts_of(CASES[1]), GREEDY)
    assert any(n for is_decode, n, _ in seen if not is_decode)
    for _, _, counts in seen:
        assert counts.pop("launches") > 0
        assert counts in ({"copies in": 1, "copies out": 1, "waits": 1}, {"copies in": 1})


def test_explain_tells_of_graphs_with_drafts(gpu):
    llm = open_gpu(CASES[0], 4)
    llm.generate(prompts_of(CASES[0], 2), GREEDY)
    assert "2 with 4 drafts" in llm.explain() and "captured" in llm.explain()


def test_a_step_interrupted_leaves_an_engine_that_goes_on(gpu):
    """Ctrl-C while a graph with drafts is captured: the next request says what it would have said."""
    llm, prompt = open_gpu(CASES[0], 4), prompts_of(CASES[0])[2]
    expected = open_pair(CASES[0], None, "emulated").generate(prompt, GREEDY).token_ids
    assistant = llm._core.draft
    draft = assistant.draft

    def interrupted(*args):
        if gpu.capturing:
            raise KeyboardInterrupt
        draft(*args)
    assistant.draft = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompt, GREEDY)
    assistant.draft = draft
    assert llm.generate(prompt, GREEDY).token_ids == expected and not llm.graphs.failures
