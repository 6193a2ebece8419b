"""What a request gets does not depend on chunks, batch-mates, pages, preemption or what went wrong beside it."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import SamplingParams, reference
from engine.feed_forward import FeedForward
from engine.tasks import Generation
from tests import tiny_models as tiny
from tests.faults import Broken, break_at
from tests.golden import assert_logits_close

NAMES = ("gemma3", "gemma4", "gemma3-window-2", "gemma4-window-2", "gemma3-window-200", "gemma4-window-200",
         "gemma4-sliding-only", "gemma4-moe", "gemma4-e", "llama4")
CLOSE = 1e-5                # of max|logit|: a BLAS sums in an order that depends on the number of rows
PROMPTS = tiny.prompts(1, 1, 33, 5, 18, 2, 40, 9)
GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, top_k=30, top_p=0.95, seed=7, max_tokens=14, ignore_eos=True)


def ids(outputs):
    return [output.token_ids for output in outputs]


def assert_all_free(llm):
    stats = llm.stats()
    assert stats["running"] == stats["waiting"] == 0
    assert [pages.n_free for pages in llm.kv_cache.allocators] == [pages.n_pages for pages in llm.kv_cache.allocators]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def alone(checkpoints, name):
    """What each prompt gets when it runs alone, in one chunk: {"logits", "greedy", "drawn"}, a list each."""
    llm = tiny.open_llm(checkpoints[name], page_size=128)
    return {"logits": [llm.forward([prompt], return_logits="all").logits[0] for prompt in PROMPTS],
            "greedy": [llm.generate(prompt, GREEDY).token_ids for prompt in PROMPTS],
            "drawn": [llm.generate(prompt, DRAWN).token_ids for prompt in PROMPTS]}


SETTINGS = {
    "page-1": {"page_size": 1}, "page-3": {"page_size": 3}, "page-16": {"page_size": 16}, "page-64": {"page_size": 64},
    "token-by-token": {"max_batch_tokens": 1, "max_seqs": 8}, "chunks-of-5": {"max_batch_tokens": 5, "page_size": 3},
    "chunks-of-17": {"max_batch_tokens": 17, "page_size": 4, "max_seqs": 3}, "one-at-a-time": {"max_seqs": 1},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_chunks_pages_and_batches_do_not_show(checkpoints, name, alone, setting):
    llm = tiny.open_llm(checkpoints[name], **SETTINGS[setting])
    for logits, expected in zip(llm.forward(PROMPTS, return_logits="all").logits, alone["logits"], strict=True):
        assert_logits_close(logits, expected, CLOSE)
    assert ids(llm.generate(PROMPTS, GREEDY)) == alone["greedy"]
    assert ids(llm.generate(PROMPTS, DRAWN)) == alone["drawn"]
    assert_all_free(llm)


@pytest.mark.parametrize("page_size, max_batch_tokens, n_seqs",
                         [(1, 2048, 1.8), (3, 7, 1.4), (4, 30, 1.4), (16, 4, 1.4)])
def test_preemption_does_not_show(checkpoints, name, alone, page_size, max_batch_tokens, n_seqs):
    """Pages for little more than one sequence: others are thrown out midway, recomputed, and get the same tokens."""
    sizes = {"page_size": page_size, "max_seq_len": 56}
    llm = tiny.open_llm(checkpoints[name], kv_cache_bytes=tiny.kv_bytes_for(checkpoints[name], n_seqs, **sizes),
                        max_batch_tokens=max_batch_tokens, **sizes)
    outputs = llm.generate(PROMPTS * 2, [GREEDY] * len(PROMPTS) + [DRAWN] * len(PROMPTS))
    assert llm.stats()["preemptions"] > 0
    assert sum(output.metrics.n_preemptions for output in outputs) == llm.stats()["preemptions"]
    assert ids(outputs) == alone["greedy"] + alone["drawn"]
    for logits, expected in zip(llm.forward(PROMPTS, return_logits="all").logits, alone["logits"], strict=True):
        assert_logits_close(logits, expected, CLOSE)
    assert_all_free(llm)


def test_generated_tokens_are_those_of_a_full_forward(checkpoints, name, alone):
    """Greedy decoding, one token a step, picks the argmax of one forward pass over prompt and output."""
    llm = tiny.open_llm(checkpoints[name])
    rows = [prompt + tokens[:-1] for prompt, tokens in zip(PROMPTS, alone["greedy"], strict=True)]
    result = llm.forward(rows, return_logits=GREEDY.max_tokens)
    assert [logits.argmax(axis=1).tolist() for logits in result.logits] == alone["greedy"]


def test_hidden_states_do_not_depend_on_chunks(checkpoints, name):
    whole, chunked = (tiny.open_llm(checkpoints[name], max_batch_tokens=n, page_size=3) for n in (2048, 7))
    for wanted in (True, "layers"):
        for a, b in zip(*(llm.forward(PROMPTS, return_hidden_states=wanted).hidden_states for llm in (whole, chunked)),
                        strict=True):
            assert_logits_close(a, b, CLOSE)


def test_drawn_text_does_not_depend_on_batch_mates(checkpoints):
    """One seeded request: alone, between others that come and go, in any place of the batch."""
    llm = tiny.open_llm(checkpoints["gemma4"], page_size=4)
    expected = llm.generate(PROMPTS[3], DRAWN).token_ids
    others = SamplingParams(max_tokens=5)
    for place in (0, 3, 6):
        batch, params = PROMPTS[:6], [others] * 6
        batch.insert(place, PROMPTS[3])
        params.insert(place, DRAWN)
        assert llm.generate(batch, params)[place].token_ids == expected


# --- nothing reads K and V but through pages

def poison(llm):
    for array in (*llm.kv_cache.k, *llm.kv_cache.v):
        array.fill(np.nan)


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "gemma4-e", "llama4"])
def test_pages_overwritten_between_steps_are_noticed(checkpoints, name, monkeypatch):
    """With NaN in every page before each step but the first, forward in chunks and generate cannot come out right."""
    llm = tiny.open_llm(checkpoints[name], max_batch_tokens=8, page_size=4)
    params = SamplingParams(temperature=0, max_tokens=4, n_logprobs=1, ignore_eos=True)
    right = llm.generate(PROMPTS[1], params)
    run, n_runs = llm._core.step.layers.run, 0

    def run_after_poison(*args):
        nonlocal n_runs
        n_runs += 1
        if n_runs > 1:
            poison(llm)
        return run(*args)

    monkeypatch.setattr(llm._core.step.layers, "run", run_after_poison)
    logits = llm.forward([PROMPTS[1]], return_logits="all").logits[0]
    assert np.isfinite(logits[:8]).all() and np.isnan(logits[8:]).all()
    n_runs = 0
    output = llm.generate(PROMPTS[0], params)
    assert [np.isnan(list(row.values())).all() for row in output.logprobs] == [False, True, True, True]
    n_runs = 1
    wrong = llm.generate(PROMPTS[1], params)
    assert wrong.token_ids != right.token_ids and np.isnan([list(row.values()) for row in wrong.logprobs]).all()


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_pages_overwritten_before_attention_are_noticed(checkpoints, name, monkeypatch):
    """Even in one chunk, attention sees the new keys and values in their pages and nowhere else."""
    llm = tiny.open_llm(checkpoints[name])
    attention = reference.attention

    def attention_after_poison(*args, **kwargs):
        poison(llm)
        attention(*args, **kwargs)

    monkeypatch.setattr(reference, "attention", attention_after_poison)
    assert np.isnan(llm.forward([PROMPTS[1]], return_logits="all").logits[0]).all()
    output = llm.generate(PROMPTS[1], SamplingParams(temperature=0, max_tokens=2, n_logprobs=1))
    assert np.isnan([list(row.values()) for row in output.logprobs]).all()


def test_a_stream_notices_pages_overwritten_between_its_pieces(checkpoints):
    llm = tiny.open_llm(checkpoints["gemma4"])
    expected = llm.generate(PROMPTS[3], GREEDY).token_ids
    stream = llm.stream(PROMPTS[3], GREEDY)
    tokens = list(next(stream).token_ids)
    poison(llm)
    tokens += [token for piece in stream for token in piece.token_ids]
    assert tokens[0] == expected[0] and tokens != expected


def test_pages_of_an_earlier_request_do_not_shine_through(checkpoints):
    """Pages full of NaN that nobody wrote yet are harmless: only written positions are read."""
    llm = tiny.open_llm(checkpoints["gemma4"], page_size=16, max_batch_tokens=5)
    expected = [ids(llm.generate(PROMPTS, params)) for params in (GREEDY, DRAWN)]
    poison(llm)
    assert [ids(llm.generate(PROMPTS, params)) for params in (GREEDY, DRAWN)] == expected


# --- no leaks

def test_aborts_leave_nothing_behind(checkpoints):
    """Streams closed before they began, after their first piece, midway, while waiting, and forgotten."""
    llm = tiny.open_llm(checkpoints["gemma4"], max_seqs=2, max_batch_tokens=6, page_size=3)
    expected = llm.generate(PROMPTS[1], GREEDY).token_ids
    llm.stream(PROMPTS[0], GREEDY).close()
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS]
    for n_pieces, stream in enumerate(streams[:4]):
        for _ in range(n_pieces):
            next(stream)
    for stream in streams[:3]:
        stream.close()
    next(streams[4])
    del streams, stream
    assert_all_free(llm)
    assert llm.generate(PROMPTS[1], GREEDY).token_ids == expected


@pytest.mark.parametrize("op", ["embed", "attention", "linear", "logit_softcap"])
@pytest.mark.parametrize("call", [1, 2, 3, 8, 20, 21, 22])
def test_a_step_that_raises_leaves_nothing_behind(checkpoints, monkeypatch, op, call):
    """An op fails at its n-th call: the caller gets the error, an open stream goes on, all pages come back."""
    llm = tiny.open_llm(checkpoints["gemma4"], max_seqs=3, max_batch_tokens=9, page_size=3)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, n_logprobs=2, prompt_logprobs=1)
    short = SamplingParams(temperature=0, max_tokens=1)
    expected = llm.generate(PROMPTS[2], params)
    stream = llm.stream(PROMPTS[2], params)
    tokens = list(next(stream).token_ids)
    with monkeypatch.context() as patch:
        break_at(patch, reference, op, call)
        with pytest.raises(Broken):
            for _ in range(20):
                llm.generate([PROMPTS[4], PROMPTS[0], PROMPTS[5]], [short, params, params])
                llm.forward([PROMPTS[4], PROMPTS[0], PROMPTS[3]], return_logits="all")
    assert llm.stats()["running"] + llm.stats()["waiting"] <= 1
    again = llm.generate(PROMPTS[2], params)
    assert again.token_ids == expected.token_ids
    for got, wanted in zip(again.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
        assert got == pytest.approx(wanted, abs=1e-4)
    tokens += [token for piece in stream for token in piece.token_ids]
    assert tokens == expected.token_ids
    assert_all_free(llm)


@pytest.mark.parametrize("max_tokens", [2, 9])
def test_a_step_that_fails_between_two_samples_leaves_nothing_behind(checkpoints, monkeypatch, max_tokens):
    """Of the requests of one step some have their token, or have ended with it, when the next one fails."""
    llm = tiny.open_llm(checkpoints["gemma4"])
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    expected = llm.generate(PROMPTS[3], params).token_ids
    first, second = llm.stream(PROMPTS[3], params), llm.stream(PROMPTS[3], params)
    tokens = [list(next(stream).token_ids) for stream in (first, second)]
    with monkeypatch.context() as patch:
        break_at(patch, Generation, "append", 4)
        with pytest.raises(Broken):
            llm.generate(PROMPTS[:4], SamplingParams(temperature=0, max_tokens=1))
    stats = llm.stats()                                         # the two streams, where unfinished, begin again
    assert stats["running"] == 0 and stats["waiting"] <= 2 and stats["preemptions"] == 0
    assert all(pool["n_free"] == pool["n_pages"] for pool in stats["pools"])
    assert llm.generate(PROMPTS[3], params).token_ids == expected
    for stream, so_far in zip((first, second), tokens, strict=True):
        assert so_far + [token for piece in stream for token in piece.token_ids] == expected
    assert_all_free(llm)


# --- random histories on a real model

@cache
def tokens_alone(path, which, seed, max_tokens):
    """What a request gets in an engine of its own."""
    return _lonely_engine(path).generate(PROMPTS[which], _params(seed, max_tokens)).token_ids


@cache
def _lonely_engine(path):
    return tiny.open_llm(path)


def _params(seed, max_tokens):
    return SamplingParams(temperature=0 if seed is None else 1.0, seed=seed, max_tokens=max_tokens, ignore_eos=True)


REQUEST = st.tuples(st.integers(0, len(PROMPTS) - 1), st.none() | st.integers(0, 2), st.integers(1, 10))
ACTION = st.one_of(st.tuples(st.just("open"), REQUEST), st.tuples(st.just("pull"), st.integers(0, 5)),
                   st.tuples(st.just("pull"), st.integers(0, 5)), st.tuples(st.just("close"), st.integers(0, 5)),
                   st.tuples(st.just("generate"), st.lists(REQUEST, min_size=1, max_size=3)),
                   st.tuples(st.just("forward"), st.integers(0, len(PROMPTS) - 1)))


@settings(max_examples=40, deadline=None, derandomize=True)      # other draws could meet a tie closer than rounding
@given(name=st.sampled_from(["gemma3", "gemma4", "gemma4-window-2", "gemma4-e", "llama4"]),
       page_size=st.sampled_from([1, 3, 16]), n_seqs=st.floats(1, 2.5), max_seqs=st.integers(1, 4),
       max_batch_tokens=st.integers(1, 40), actions=st.lists(ACTION, min_size=2, max_size=14))
def test_any_history_gives_what_a_request_gets_alone(checkpoints, name, page_size, n_seqs, max_seqs, max_batch_tokens,
                                                     actions):
    """Streams opened, pulled and closed in any order, with generate and forward in between, in small pools."""
    path, sizes = checkpoints[name], {"page_size": page_size, "max_seq_len": 52}
    llm = tiny.open_llm(path, kv_cache_bytes=tiny.kv_bytes_for(path, n_seqs, **sizes), max_seqs=max_seqs,
                        max_batch_tokens=max_batch_tokens, **sizes)
    streams = []
    for what, argument in actions:
        if what == "open":
            which, seed, max_tokens = argument
            streams.append((llm.stream(PROMPTS[which], _params(seed, max_tokens)), argument, []))
        elif what == "pull" and argument < len(streams):
            stream, _, tokens = streams[argument]
            tokens += [token for piece in [next(stream, None)] if piece for token in piece.token_ids]
        elif what == "close" and argument < len(streams):
            stream, request, tokens = streams.pop(argument)
            stream.close()
            assert tokens == tokens_alone(path, *request)[:len(tokens)]
        elif what == "generate":
            outputs = llm.generate([PROMPTS[which] for which, _, _ in argument],
                                   [_params(*rest) for _, *rest in argument])
            assert ids(outputs) == [tokens_alone(path, *request) for request in argument]
        elif what == "forward":
            expected = _lonely_engine(path).forward([PROMPTS[argument]]).logits[0]
            assert_logits_close(llm.forward([PROMPTS[argument]]).logits[0], expected, CLOSE)
    for stream, request, tokens in streams:
        tokens += [token for piece in stream for token in piece.token_ids]
        assert tokens == tokens_alone(path, *request)
    assert_all_free(llm)


# --- rows nobody asked for are dropped

@pytest.mark.parametrize("chunk", [7, 2048])
def test_layers_that_leave_no_k_and_v_compute_only_what_was_asked_for(checkpoints, name, alone, monkeypatch, chunk):
    """Logits of a prompt's last position, and of its last three, are those of all positions; and the rows of the last
    layer's MLP, and of all that read another's K and V, are as many as were asked for, also when a chunk of the prompt
    wants none at all."""
    llm = tiny.open_llm(checkpoints[name], max_batch_tokens=chunk)
    prompts, every = PROMPTS, alone["logits"]
    layers, n_rows = llm.spec.layers, {}
    whole = FeedForward.__call__

    def spy(self, layer, w, residual, normed, out):
        i = next(i for i, known in enumerate(llm.weights.layers) if known is w)
        n_rows[i] = n_rows.get(i, 0) + len(normed)
        whole(self, layer, w, residual, normed, out)
    monkeypatch.setattr(FeedForward, "__call__", spy)
    for n in (1, 3):
        n_rows.clear()
        for got, expected in zip(llm.forward(prompts, return_logits=n).logits, every, strict=True):
            assert_logits_close(got, expected[-n:], CLOSE)
        first = llm.spec.drops_at
        wanted = sum(min(n, len(prompt)) for prompt in prompts)
        assert n_rows == {i: sum(map(len, prompts)) if i < first else wanted for i in range(len(layers))}
