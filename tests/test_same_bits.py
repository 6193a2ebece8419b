"""The same bits, whatever shares the batch: on the kernels, emulated or (--lane cuda) on a GPU."""

import numpy as np
import pytest

from engine import SamplingParams
from tests.golden import Golden


def tiny_prompt(n):
    return np.random.default_rng(n).integers(3, 60, n).tolist()


@pytest.fixture(scope="module", params=["gemma3-text", "gemma4-dense", "gemma4-moe", "gemma4-e", "llama4-text"])
def same_bits(request, open_llm):
    """(golden, its prompts, the logits of each alone and whole). The longest prompt, of 137 tokens, is there twice."""
    golden = Golden(request.param)
    prompts = golden.prompts if request.param in ("gemma3-text", "gemma4-dense") else golden.prompts[:-1]
    llm = open_llm(golden.checkpoint)
    return golden, prompts, [llm.forward([prompt], return_logits="all").logits[0] for prompt in prompts]


@pytest.mark.parametrize("arguments", [{"max_batch_tokens": 1}, {"max_batch_tokens": 2},
                                       {"max_batch_tokens": 7, "page_size": 3},
                                       {"max_batch_tokens": 16}, {"page_size": 1}, {"max_batch_tokens": 64}])
def test_logits_are_the_same_bits_however_a_prompt_is_cut(same_bits, arguments, open_llm):
    golden, prompts, alone = same_bits
    prompts = prompts if arguments.get("max_batch_tokens", 64) >= 16 else prompts[:3]
    for got, expected in zip(open_llm(golden.checkpoint, **arguments).forward(prompts, return_logits="all").logits,
                             alone, strict=False):
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


def test_logits_are_the_same_bits_in_any_order_of_the_batch(same_bits, open_llm):
    golden, prompts, alone = same_bits
    order = [*reversed(range(len(prompts))), 0, 1]
    got = open_llm(golden.checkpoint).forward([prompts[i] for i in order], return_logits="all").logits
    for i, logits in zip(order, got, strict=True):
        np.testing.assert_array_equal(logits.view(np.uint32), alone[i].view(np.uint32))


def test_logits_of_last_positions_are_the_same_bits_as_among_all(same_bits, open_llm):
    """Rows that nobody asked for are dropped: before the last layer's MLP, or before the first layer that reads
    another's K and V. Neither changes a bit of the others, whole or in chunks, and neither do rows that stay."""
    golden, prompts, alone = same_bits
    for chunk, n in ((64, 1), (2048, 3)):
        llm = open_llm(golden.checkpoint, max_batch_tokens=chunk)
        layers = llm._core.step.layers
        for drops_at in sorted({layers.drops_at, len(llm.spec.layers) - 1}):
            layers.drops_at = drops_at
            for got, expected in zip(llm.forward(prompts, return_logits=n).logits, alone, strict=True):
                np.testing.assert_array_equal(got.view(np.uint32), expected[-n:].view(np.uint32))


def test_logits_are_the_same_bits_with_the_second_table_on_the_host(open_llm):
    golden = Golden("gemma4-e")
    device, host = (open_llm(golden.checkpoint, ple=ple, max_batch_tokens=64) for ple in ("device", "host"))
    assert device.weights.per_layer_rows is None and host.weights.per_layer_embed is None
    assert device.plan().weights_bytes - host.plan().weights_bytes == device.weights.per_layer_embed.nbytes
    prompts = golden.prompts[:-1]
    for got, expected in zip(*(llm.forward(prompts).logits for llm in (host, device)), strict=True):
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    assert [output.token_ids for output in host.generate(prompts, params)] == [
        output.token_ids for output in device.generate(prompts, params)]


@pytest.mark.parametrize("name", ["gemma4", "gemma4-moe", "gemma4-e", "llama4"])
def test_decoded_tokens_have_the_logits_of_the_whole_text(checkpoints, open_llm, name):
    """Cached or not: what decoding saw is what one forward pass over the finished text computes."""
    llm = open_llm(checkpoints[name], max_seq_len=64)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for output in llm.generate([tiny_prompt(5), tiny_prompt(17)], params):
        text = output.prompt_token_ids + output.token_ids
        logits = llm.forward([text[:-1]], return_logits=len(output.token_ids)).logits[0]
        assert [int(row.argmax()) for row in logits] == output.token_ids


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "gemma4-moe", "gemma4-e", "llama4"])
def test_sampled_tokens_do_not_depend_on_the_batch_or_on_preemption(checkpoints, open_llm, name):
    prompts = [tiny_prompt(n) for n in (3, 9, 14, 6)]
    params = [SamplingParams(temperature=1.5, top_k=20, top_p=0.9, seed=i, max_tokens=16, ignore_eos=True,
                             repetition_penalty=1.2, frequency_penalty=0.1) for i in range(4)]
    llm = open_llm(checkpoints[name], max_seq_len=64)
    together = [output.token_ids for output in llm.generate(prompts, params)]
    assert [llm.generate(prompt, one).token_ids for prompt, one in zip(prompts, params, strict=True)] == together
    tight = open_llm(checkpoints[name], max_seq_len=32, page_size=4, max_batch_tokens=8,
                          kv_cache_bytes=pages_for_two(llm, 32, 4))
    assert [output.token_ids for output in tight.generate(prompts, params)] == together
    assert tight.stats()["preemptions"] > 0


def pages_for_two(llm, n_tokens, page_size):
    """Bytes of KV cache that hold about one and a half sequences of n_tokens."""
    specs = llm.kv_cache.specs
    return int(1.5 * sum(spec.pages_needed(n_tokens, page_size) * page_size * spec.token_bytes(2) for spec in specs))
