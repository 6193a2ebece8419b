"""Text with drafts is the text without, whatever the drafts, chunks, pages and batch-mates, and however it is drawn."""

import pytest

from engine import SamplingParams
from tests import tiny_models as tiny
from tests.golden import Golden, assert_logits_close
from tests.speculating import CASES, assert_all_free, assert_logprobs_close, batches_of, open_pair, texts

GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=24)
N_DRAFTS = (0, 1, 2, 4, 8, 16)
# Every kind of filter and edit; low temperatures, so that drafts hold now and then.
DRAWN = [SamplingParams(temperature=0.7, seed=1, max_tokens=20, ignore_eos=True),
         SamplingParams(temperature=1.0, top_k=5, seed=2, max_tokens=20, ignore_eos=True, n_logprobs=3),
         SamplingParams(temperature=0.5, top_p=0.8, seed=3, max_tokens=17, ignore_eos=True, prompt_logprobs=2),
         SamplingParams(temperature=0.4, min_p=0.2, seed=4, max_tokens=20, ignore_eos=True, logit_bias={7: 3.0, 9: -4}),
         SamplingParams(temperature=0.2, repetition_penalty=1.5, seed=5, max_tokens=20, ignore_eos=True, n_logprobs=1),
         SamplingParams(temperature=0.2, presence_penalty=0.8, frequency_penalty=0.5, seed=6, max_tokens=20),
         SamplingParams(temperature=0, min_tokens=12, stop_token_ids=(5, 11, 17), seed=7, max_tokens=20),
         SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=20, ignore_eos=True, n_logprobs=2)]


def prompts_of(case, n):
    """n prompts of a golden, some of them cut short so that no two are the same."""
    prompts = Golden(case).prompts
    return [prompts[i % len(prompts)][i // len(prompts):] for i in range(n)]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def plain(case):
    """The outputs of eight prompts without a draft model."""
    return open_pair(case, None).generate(prompts_of(case, 8), DRAWN)


@pytest.mark.parametrize("n_drafts", N_DRAFTS)
def test_greedy_text_is_the_goldens(case, n_drafts):
    golden = Golden(case)
    llm = open_pair(case, n_drafts)
    n_new = len(golden.greedy(0))
    outputs = llm.generate(golden.prompts, SamplingParams(temperature=0, ignore_eos=True, max_tokens=n_new))
    for i, output in enumerate(outputs):
        assert output.token_ids == golden.greedy(i)
        assert output.token_ids == golden[f"p{i}.assisted_ids"].tolist()
    stats = llm.stats()["drafts"]
    assert len(stats["acceptance"]) == n_drafts and stats["steps"] + stats["accepted"] == len(outputs) * n_new
    assert stats["accepted"] >= len(outputs) * n_new // 5 or not n_drafts
    assert llm.stats()["generated_tokens"] == len(outputs) * n_new
    assert_all_free(llm)


@pytest.mark.parametrize("n_seqs", [1, 2, 7])
@pytest.mark.parametrize("n_drafts", [4, "auto"])
def test_batches_do_not_show(case, plain, n_seqs, n_drafts):
    llm = open_pair(case, n_drafts)
    got = llm.generate(prompts_of(case, 8)[-n_seqs:], DRAWN[-n_seqs:])
    assert texts(got) == texts(plain[-n_seqs:])
    assert_logprobs_close(got, plain[-n_seqs:])
    assert llm.stats()["drafts"]["accepted"] > 0 or n_drafts == "auto" or n_seqs < 7
    assert_all_free(llm)


SETTINGS = {"page-1": {"page_size": 1}, "page-3": {"page_size": 3}, "chunks-of-5": {"max_batch_tokens": 5},
            "chunks-of-17": {"max_batch_tokens": 17, "page_size": 4, "max_seqs": 3},
            "token-by-token": {"max_batch_tokens": 1, "max_seqs": 4}, "one-at-a-time": {"max_seqs": 1}}


@pytest.mark.parametrize("setting", SETTINGS)
def test_chunks_and_pages_do_not_show(case, plain, setting):
    """Prompts in chunks beside drafts; with one token a step there is no room for any."""
    llm = open_pair(case, **SETTINGS[setting])
    got = llm.generate(prompts_of(case, 8), DRAWN)
    assert texts(got) == texts(plain)
    assert_logprobs_close(got, plain)
    assert bool(llm.stats()["drafts"]["drafted"]) == (setting != "token-by-token")
    assert_all_free(llm)


@pytest.mark.parametrize("page_size, max_batch_tokens, n_drafts", [(1, 2048, 4), (3, 7, 2), (4, 30, 16)])
def test_preemption_does_not_show(case, plain, page_size, max_batch_tokens, n_drafts):
    """Pages for little more than one sequence: drafts go first, then newer sequences; both come again."""
    sizes = {"page_size": page_size, "max_seq_len": 140}
    kv_cache_bytes = tiny.kv_bytes_for(Golden(case).checkpoint, 1.3, **sizes)
    llm = open_pair(case, n_drafts, kv_cache_bytes=kv_cache_bytes, max_batch_tokens=max_batch_tokens, **sizes)
    assert texts(llm.generate(prompts_of(case, 8), DRAWN)) == texts(plain)
    assert llm.stats()["preemptions"] > 0 and llm.stats()["drafts"]["accepted"] > 0
    assert_all_free(llm)


def test_a_probe_shares_steps_with_drafts(case):
    """LLM.forward between steps of a text that is streamed: logits and states are what they were."""
    llm, probe = open_pair(case, max_batch_tokens=16), prompts_of(case, 3)[2]
    alone = llm.forward([probe], return_logits="all", return_hidden_states=True)
    pieces, forwards = [], []
    for piece in llm.stream(prompts_of(case, 1)[0], GREEDY):
        pieces += piece.token_ids
        forwards.append(llm.forward([probe], return_logits="all", return_hidden_states=True))
    assert pieces == Golden(case).greedy(0)[:24]
    for output in forwards:
        assert_logits_close(output.logits[0], alone.logits[0], 1e-5)
        assert_logits_close(output.hidden_states[0], alone.hidden_states[0], 1e-5)


def test_drafts_come_with_the_first_token_and_never_with_a_chunk(case):
    """The step that ends a prompt drafts; those before it do not, and have nothing to decide."""
    llm = open_pair(case, max_batch_tokens=8)
    seen = batches_of(llm, lambda batch, sampled: (len(batch.decided), sampled.drafts, batch.n_tokens))
    llm.generate(max(Golden(case).prompts, key=len)[:20], GREEDY)
    assert [n for n, _, _ in seen[:4]] == [0, 0, 1, 1]
    assert seen[0][1] == seen[1][1] == [] and len(seen[2][1][0]) == 4
    assert [n for _, _, n in seen[:4]] == [8, 8, 4, 5]


def test_a_seed_says_the_same_with_any_number_of_drafts(case):
    params = SamplingParams(temperature=0.6, top_k=20, max_tokens=20, ignore_eos=True)
    prompts = prompts_of(case, 3)
    got = [texts(open_pair(case, n, seed=99).generate(prompts, params)) for n in (None, 1, 3, 8)]
    assert got[0] == got[1] == got[2] == got[3]
    assert got[0] != texts(open_pair(case, 3, seed=98).generate(prompts, params))
