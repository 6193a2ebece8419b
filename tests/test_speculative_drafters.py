"""Draft models that are right, wrong or random: the text is the same, and what is accepted says how good they are."""

from dataclasses import replace

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.kv_cache import PoolSpec
from tests import tiny_models as tiny
from tests.draft_pair import Pair
from tests.golden import Golden
from tests.speculating import CASES, Drafter, assert_all_free, open_pair, oracle, texts
from tests.tiny_draft import write_draft

GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=32)
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, seed=4, ignore_eos=True, max_tokens=32, repetition_penalty=1.1)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def plain(case):
    return open_pair(case, None).generate(Golden(case).prompts, [GREEDY, DRAWN] * 2)


def generate(case, says, n_drafts, **arguments):
    """(texts, stats of drafts) with a Drafter, and that everything is free behind it."""
    llm = open_pair(case, n_drafts, **arguments)
    Drafter(llm, says)
    outputs = llm.generate(Golden(case).prompts, [GREEDY, DRAWN] * 2)
    assert_all_free(llm)
    return texts(outputs), llm.stats()["drafts"]


@pytest.mark.parametrize("n_drafts", [1, 4, 16])
def test_a_drafter_that_knows_everything_is_always_right(case, plain, n_drafts):
    got, stats = generate(case, oracle(plain), n_drafts)
    assert got == texts(plain)
    assert stats["accepted"] == stats["drafted"] > 0 and set(stats["acceptance"]) == {1.0}
    assert stats["steps"] == len(plain) * (1 + -(-31 // (n_drafts + 1)))


@pytest.mark.parametrize("n_drafts", [1, 16])
def test_a_drafter_that_is_always_wrong_costs_no_text(case, plain, n_drafts):
    got, stats = generate(case, oracle(plain, wrong=True), n_drafts, page_size=3)
    assert got == texts(plain)
    assert stats["accepted"] == 0 and stats["drafted"] > 0 and stats["steps"] == 4 * 32


@pytest.mark.parametrize("n_drafts", [2, 7])
def test_a_drafter_that_guesses(case, plain, n_drafts):
    """Any mixture of right, wrong and random drafts, and of where the first wrong one is."""
    rng, knows, vocab = np.random.default_rng(n_drafts), oracle(plain), 350
    def says(text, n):
        ids = knows(text, n)
        return [token if rng.random() < 0.7 else int(rng.integers(vocab)) for token in ids]
    got, stats = generate(case, says, n_drafts, page_size=3, max_batch_tokens=23)
    assert got == texts(plain) and 0.4 < stats["acceptance"][0] < 0.95


# --- the draft model itself

def replaced_drafts(llm, says):
    """[(text, what the draft model drafts behind it)] of every step from now on, in which says(text, n) is judged."""
    drafter, found = Drafter(llm), []

    def draft(next_token, states, inputs, n_steps, out, choose=None):
        drafter.real(next_token, states, inputs, n_steps, out, choose)
        known = drafter.texts(next_token, inputs)
        found.extend(zip(known, out.T.tolist(), strict=True))
        out[...] = np.array([says(text, n_steps) for text in known]).T
    llm._core.draft.draft = draft
    return found


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_step_drafts_what_the_draft_model_says_there(case, device):
    """The same drafts as in a round of its own behind a text that is computed anew: the step hands it the right state,
    position and pages, however many drafts held, in chunks and alone. Prompts end before position 64, where a tile of
    keys does, and texts behind it."""
    prompt, params = max(Golden(case).prompts, key=len), replace(GREEDY, max_tokens=12)
    prompts, rng = [prompt[:n] for n in (9, 59, 61, 62)], np.random.default_rng(3)
    plain = open_pair(case, None, device).generate(prompts, params)
    right, wrong = oracle(plain), oracle(plain, wrong=True)

    def says(text, n):
        n_right = int(rng.choice([0, 1, n, n]))
        return [*right(text, n)[:n_right], *wrong(text, n)[n_right:]]
    llm = open_pair(case, 3, device, max_batch_tokens=19, page_size=5)
    found = replaced_drafts(llm, says)
    assert texts(llm.generate(prompts, params)) == texts(plain)
    assert 0.3 < llm.stats()["drafts"]["acceptance"][2] < 0.9
    pair = Pair(case, device, samples=False)
    for text, drafts in found[::3]:
        sequence = pair.cached(text[:-1])
        assert pair.draft([sequence], text[-1:], len(drafts))[0].tolist() == drafts
        pair.kv_cache.release(sequence)


# --- pages

def poison_free_pages(llm):
    for pages, *arrays in zip(llm.kv_cache.allocators, llm.kv_cache.k, llm.kv_cache.v, strict=True):
        free = [page for begin, end in pages._extents for page in range(begin, end)]
        for array in arrays:
            array[:, free] = np.nan


def real_drafts_when_all_is_rejected(path, draft, page_size, poisons, n_drafts=16):
    """(the real draft model's drafts in every step, texts) of a run whose drafts are then replaced by wrong ones."""
    llm = LLM(path, device="cpu", progress=False, max_seq_len=96, page_size=page_size, draft=draft,
              n_draft_tokens=n_drafts)
    plain, prompts = tiny.open_llm(path), tiny.prompts(7, 11, 6)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=40)
    found = replaced_drafts(llm, oracle(plain.generate(prompts, params), wrong=True))
    if poisons:
        next_batch = llm.scheduler.next_batch

        def poisoned():
            poison_free_pages(llm)                              # before any page of this step is taken
            return next_batch()
        llm.scheduler.next_batch = poisoned
    outputs = llm.generate(prompts, params)
    assert llm.stats()["drafts"]["accepted"] == 0
    return found, texts(outputs)


@pytest.mark.parametrize("page_size", [1, 2, 5, 16])
def test_a_page_that_is_read_is_never_free(checkpoints, tmp_path, page_size, monkeypatch):
    """16 drafts, rejected at the first slot in every step, beside a window of 5 that ends on the border of a page
    sooner or later: neither the target nor the draft model reads a page given back. It would, if windows moved with
    the drafts, as the same run shows then."""
    path = checkpoints["gemma4"]
    draft = write_draft(tmp_path / "draft", path)
    expected = real_drafts_when_all_is_rejected(path, draft, page_size, poisons=False)
    assert real_drafts_when_all_is_rejected(path, draft, page_size, poisons=True) == expected
    first_live = PoolSpec.first_live
    monkeypatch.setattr(PoolSpec, "first_live", lambda self, n_cached: first_live(self, n_cached + 3))
    assert real_drafts_when_all_is_rejected(path, draft, page_size, poisons=True) != expected


# --- drafts that are wired wrongly: the text says nothing of it

@pytest.fixture(scope="module")
def accepted(case):
    return acceptance(case)


def acceptance(case, spoil=None):
    """Share of first drafted tokens accepted, in greedy text; spoil(next_token, states, inputs) -> the same, wrong."""
    llm = open_pair(case)
    assistant, golden = llm._core.draft, Golden(case)
    draft = assistant.draft
    if spoil:
        assistant.draft = lambda token, states, inputs, *rest: draft(*spoil(token, states, inputs), *rest)
    outputs = llm.generate(golden.prompts, GREEDY)
    assert [output.token_ids for output in outputs] == [golden.greedy(i) for i in range(len(outputs))]
    return llm.stats()["drafts"]["acceptance"][0]


def swapped_pages(token, states, inputs):
    for paged in inputs.pools.values():
        paged.lists.reverse()
        inputs.context_lens[...] = min(inputs.context_lens)
    return token, states, inputs


@pytest.mark.parametrize("spoil", [
    swapped_pages, lambda token, states, inputs: (token, np.roll(states, 1, axis=0), inputs)], ids=["pages", "states"])
def test_wrong_wiring_lowers_acceptance(case, accepted, spoil):
    """The pages or states of a neighbour: the text is right, and fewer drafts hold."""
    assert accepted > 0.4
    assert acceptance(case, spoil) < 0.6 * accepted
