"""draft_sampling="sample": drafts are drawn, and the text is of the law of plain decoding, though not the same; and the
relaxed rule, which is lossy where the model thinks."""

from itertools import product

import numpy as np
import pytest

from engine import LLM, SamplingParams, reference_drafts
from engine.reference_drafts import RESIDUAL, accept_coin, draw, probabilities
from tests import tiny_models as tiny
from tests.golden import Golden
from tests.speculating import CASES, Drafter, assert_all_free, open_pair, texts
from tests.test_sampler import chi_square_z, target_probs
from tests.tiny_draft import add_thinking, write_draft

CLOSE, FAR = 4, 10                      # standard deviations of Pearson's statistic, as in test_rejection_statistics.py
N_TEXTS, N_NEW, VOCAB = 1200, 3, 16     # the last two of three tokens are drafted at once
RULE = SamplingParams(temperature=1.3, top_k=3, max_tokens=N_NEW + 1, ignore_eos=True)
PROMPT = [3, 9, 5, 14]


class Law:
    """What a tiny model of 16 tokens says behind PROMPT: logits [16] by text, and the law of three tokens."""

    def __init__(self, llm):
        rows = [[*PROMPT, *more] for n in range(N_NEW) for more in product(range(VOCAB), repeat=n)]
        found = llm.forward(rows).logits
        self.logits = {tuple(row): logits[0] for row, logits in zip(rows, found, strict=True)}
        rng = np.random.default_rng(8)
        self.noisy = {text: logits + rng.standard_normal(VOCAB) for text, logits in self.logits.items()}

    def joint(self, params):
        """[16 ** 3] probabilities of what is said."""
        probs = np.array([1.0])
        for n in range(N_NEW):
            step = np.stack([target_probs(self.logits[(*PROMPT, *more)], params)
                             for more in product(range(VOCAB), repeat=n)])
            probs = (probs[:, None] * step).reshape(-1)
        return probs


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(target, draft) of 16 tokens."""
    root = tmp_path_factory.mktemp("sixteen")
    target = tiny.write(root / "target", "gemma4", with_text=False, vocab_size=VOCAB)
    return target, write_draft(root / "draft", target, n_centroids=0)


@pytest.fixture(scope="module")
def law(pair):
    return Law(LLM(pair[0], device="cpu", progress=False, max_seq_len=16))


def open_sampling(pair, logits=None, n_drafts=2):
    """An engine that draws drafts, by logits(text) if given, else by the draft model."""
    llm = LLM(pair[0], draft=pair[1], n_draft_tokens=n_drafts, draft_sampling="sample", device="cpu", progress=False,
              max_seq_len=16, max_seqs=128)
    if logits:
        Drafter(llm, logits=lambda text: logits[tuple(text)] if tuple(text) in logits else np.zeros(VOCAB))
    return llm


def z_of(llm, law):
    """How far the texts of many seeds are from the law, in standard deviations."""
    params = [SamplingParams(**{**vars(RULE), "seed": seed}) for seed in range(N_TEXTS)]
    counts = np.zeros((VOCAB,) * N_NEW, int)
    for output in llm.generate([PROMPT] * N_TEXTS, params):
        counts[tuple(output.token_ids[:N_NEW])] += 1
    assert_all_free(llm)
    return chi_square_z(counts, law.joint(RULE))


def test_drawn_drafts_leave_the_law_alone(pair, law):
    llm = open_sampling(pair, law.noisy)
    assert abs(z_of(llm, law)) < CLOSE
    assert 0.3 < llm.stats()["drafts"]["acceptance"][0] < 0.7


def test_a_drafter_equal_to_its_target_is_always_accepted(pair, law):
    """Then drafts are the text, and its law shows what they were drawn with."""
    llm = open_sampling(pair, law.logits)
    assert abs(z_of(llm, law)) < CLOSE
    stats = llm.stats()["drafts"]
    assert stats["drafted"] == stats["accepted"] >= N_TEXTS


def test_a_rule_that_is_a_little_wrong_fails(pair, law, monkeypatch):
    """The text behind a rejected draft drawn from the target itself, not from what the draft leaves of it."""
    def judge(target, draft, draft_probs, seed, position):
        token, weight = target
        target_probs = probabilities(weight)
        is_accepted = accept_coin(seed, position) * draft_probs[draft] < target_probs[token == draft].sum()
        return np.where(is_accepted, draft, draw([target], seed, position, RESIDUAL))
    monkeypatch.setattr(reference_drafts, "judge", judge)
    assert z_of(open_sampling(pair, law.noisy), law) > FAR


@pytest.mark.parametrize("case", CASES)
def test_greedy_requests_are_as_without_drafts_beside_drawn_ones(case):
    """And drawn ones are the same in another batch, with the same number of drafts."""
    golden = Golden(case)
    drawn = SamplingParams(temperature=0.7, seed=3, max_tokens=20, ignore_eos=True, repetition_penalty=1.2)
    greedy = SamplingParams(temperature=0, ignore_eos=True, max_tokens=20)
    plain = open_pair(case, None).generate(golden.prompts, [greedy, drawn] * 2)
    llm = open_pair(case, draft_sampling="sample", max_batch_tokens=40)
    got = llm.generate(golden.prompts, [greedy, drawn] * 2)
    assert texts(got[::2]) == texts(plain[::2]) and llm.stats()["drafts"]["accepted"] > 0
    alone = open_pair(case, draft_sampling="sample").generate(golden.prompts[1], drawn)
    assert texts([alone]) == texts(got[1:2])


@pytest.mark.parametrize("n_drafts", [16, "auto"])
@pytest.mark.parametrize("case", CASES)
def test_a_seed_says_the_same_again(case, n_drafts):
    """The same requests on a new engine, however many tokens it chooses to draft."""
    prompts, params = Golden(case).prompts, SamplingParams(temperature=0.7, max_tokens=20, ignore_eos=True)
    got = [texts(open_pair(case, n_drafts, draft_sampling="sample", seed=seed).generate(prompts, params))
           for seed in (3, 3, 4)]
    assert got[0] == got[1] != got[2]


# --- the relaxed rule

def test_a_relaxed_rule_accepts_more_while_the_model_thinks_and_nothing_more_elsewhere(tmp_path):
    target = tiny.write(tmp_path / "target", "gemma4", vocab_size=104)
    begin, end = add_thinking(target)
    draft = write_draft(tmp_path / "draft", target)
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=40, ignore_eos=True, logit_bias={begin: -50, end: -50})
    prompts = tiny.prompts(3, 12, 7)
    thinking = [[begin, *prompt] for prompt in prompts]
    plain, lossless, relaxed = (LLM(target, device="cpu", progress=False, max_seq_len=96, **more) for more in
                                ({}, {"draft": draft}, {"draft": draft, "relaxed_acceptance": {"top_k": 90,
                                                                                              "delta": 1.0}}))
    assert texts(relaxed.generate(prompts, params)) == texts(plain.generate(prompts, params))
    before = relaxed.stats()["drafts"]["accepted"]
    expected = plain.generate(thinking, params)
    assert texts(lossless.generate(thinking, params)) == texts(expected)
    assert texts(relaxed.generate(thinking, params)) != texts(expected)
    stats = relaxed.stats()["drafts"]
    assert stats["accepted"] - before > 40                      # with delta 1 all but the unlikeliest drafts hold
