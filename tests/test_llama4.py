"""Llama 4's attention: chunks on absolute boundaries, layers without RoPE that see everything, queries that grow with
their position, and pages that go back when their chunk has ended."""

import numpy as np
import pytest

from engine import SamplingParams
from tests import tiny_models as tiny
from tests.golden import assert_logits_close

CHUNK, FLOOR = 8, 5         # of tiny.FLAT["llama4"]
CLOSE = 1e-5                # of max|logit|, as in test_invariants
LENGTHS = (3, 7, 8, 9, 15, 16, 17, 24, 25, 40)
SETTINGS = ({}, {"max_batch_tokens": 1}, {"max_batch_tokens": 5, "page_size": 3}, {"max_batch_tokens": 12,
                                                                                   "page_size": 8})


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """{name: checkpoint}: with layers of both kinds, with chunked layers only, and without growing queries."""
    root = tmp_path_factory.mktemp("llama4")
    fields = {"both": {}, "chunked": {"layers": "cccc"}, "constant": {"attn_temperature_tuning": False}}
    return {name: tiny.write(root / name, "llama4", seed=5, with_text=False, **one) for name, one in fields.items()}


def with_another_beginning(prompt):
    """The prompt with the tokens of its chunks but the last replaced."""
    n = (len(prompt) - 1) // CHUNK * CHUNK
    return tiny.prompts(99, n)[0] + prompt[n:]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_chunk_knows_nothing_of_the_chunks_before(paths, setting):
    """Where every layer is chunked: the logits of the last chunk do not depend on what stands before it, however the
    prompt is cut and paged. Where some layers are not, they do."""
    prompts = tiny.prompts(3, *LENGTHS)
    others = [with_another_beginning(prompt) for prompt in prompts]
    for name in ("chunked", "both"):
        llm = tiny.open_llm(paths[name], **setting)
        for prompt, got, expected in zip(prompts, *(llm.forward(rows, return_logits="all").logits
                                                    for rows in (others, prompts)), strict=True):
            begin = (len(prompt) - 1) // CHUNK * CHUNK
            if name == "chunked" or not begin:
                assert_logits_close(got[begin:], expected[begin:], CLOSE)
            else:
                assert (np.abs(got[begin:] - expected[begin:]).max(axis=1) > 0.01 * np.abs(expected).max()).all()


def test_decoding_crosses_into_chunks_of_its_own(paths):
    """Two texts that differ in their first chunk only go on alike from the first token of the next one."""
    llm = tiny.open_llm(paths["chunked"], page_size=4)
    params = SamplingParams(temperature=0, max_tokens=2 * CHUNK + 2, ignore_eos=True)
    for n in (CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK):
        prompt, = tiny.prompts(n, n)
        one, other = (output.token_ids for output in llm.generate([prompt, with_another_beginning(prompt)], params))
        assert one == other


@pytest.mark.parametrize("name", ["both", "chunked"])
def test_decoding_over_boundaries_is_one_forward_pass(paths, name):
    """From just before, on and just behind a boundary, over two more of them."""
    llm = tiny.open_llm(paths[name], page_size=3)
    params = SamplingParams(temperature=0, max_tokens=2 * CHUNK + 3, ignore_eos=True)
    prompts = tiny.prompts(4, CHUNK - 1, CHUNK, CHUNK + 1, 1)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        rows = llm.forward([prompt + output.token_ids[:-1]], return_logits=params.max_tokens).logits[0]
        assert rows.argmax(axis=1).tolist() == output.token_ids


def test_queries_grow_from_the_floor_on(paths):
    """The temperature is 1 up to position floor_scale - 2, and from then on more than 1: before, the logits are those
    of the model without it."""
    prompt, = tiny.prompts(6, 30)
    grown, constant = (tiny.open_llm(paths[name]).forward([prompt], return_logits="all").logits[0]
                       for name in ("both", "constant"))
    assert_logits_close(grown[:FLOOR - 1], constant[:FLOOR - 1], CLOSE)
    difference = np.abs(grown - constant).max(axis=1)[FLOOR - 1:]
    assert (difference > 1e-4 * np.abs(constant).max()).all()
    decoded = tiny.open_llm(paths["both"], max_batch_tokens=1).forward([prompt], return_logits="all").logits[0]
    assert_logits_close(decoded, grown, CLOSE)


@pytest.mark.parametrize("page_size", [1, 4, 5, 16])
def test_pages_behind_the_chunk_are_returned(paths, page_size):
    """After every step a sequence holds, of the chunked pool, the pages of the chunk of its last cached position and
    none before; of the global one all. The allocators miss exactly those; at the end nothing."""
    llm = tiny.open_llm(paths["both"], page_size=page_size, max_batch_tokens=7)
    prompt, = tiny.prompts(8, 21)
    stream = llm.stream(prompt, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    n_steps = 0
    for _ in stream:
        for sequence in llm.scheduler.running:
            n_steps += 1
            last = sequence.n_cached - 1
            for spec, held, pages in zip(llm.kv_cache.specs, sequence.page_lists, llm.kv_cache.allocators, strict=True):
                begin = 0 if spec.chunk is None else last // CHUNK * CHUNK
                assert spec.chunk in (None, CHUNK)
                assert held.first == begin // page_size
                assert len(held.pages) == last // page_size - begin // page_size + 1
                assert pages.n_free == pages.n_pages - len(held.pages)
    assert n_steps >= 29 and len(llm.kv_cache.specs) == 2
    assert tiny.free_pages(llm) == [pages.n_pages for pages in llm.kv_cache.allocators]


def test_a_chunked_pool_is_small(paths):
    """A sequence of 96 positions needs pages for a chunk and a bit: the plan knows it, and it is enough."""
    sizes = {"page_size": 4, "max_seq_len": 96, "max_seqs": 1, "max_batch_tokens": 8}
    llm = tiny.open_llm(paths["both"], kv_cache_bytes=tiny.kv_bytes_for(paths["both"], 1, **sizes), **sizes)
    n_pages = {pool.kind: pool.seq_pages for pool in llm.plan().pools}
    assert n_pages == {"chunked(8)": 3, "global": 24}
    prompt, = tiny.prompts(2, 95)
    expected = tiny.open_llm(paths["both"]).forward([prompt]).logits[0]
    assert_logits_close(llm.forward([prompt]).logits[0], expected, CLOSE)
