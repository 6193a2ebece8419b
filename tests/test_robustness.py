"""What a hostile or an impatient user does: media in chat, threads, Ctrl-C anywhere, files that ask for nonsense."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engine import LLM, CheckpointError, ConfigError, PromptError, SamplingParams
from tests import tiny_models as tiny
from tests.tiny import flat, write_checkpoint
from tests.tiny_models import greedy


def test_chat_refuses_pictures_that_the_model_cannot_see(checkpoints):
    picture = [{"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "what"}]}]
    llm = tiny.open_llm(checkpoints["gemma3"])
    with pytest.raises(PromptError, match=r"images and videos came .* takes text only"):
        llm.chat(picture, greedy())
    spoken = [{"role": "user", "content": [{"type": "text", "text": "cat"}]}]
    bad, good = llm.chat([picture, spoken], greedy())
    assert bad.finish_reason == "error" and good.finish_reason == "length"


def test_a_refused_conversation_does_not_move_the_seeds_of_the_others(checkpoints):
    good = [{"role": "user", "content": "cat"}]
    first = tiny.open_llm(checkpoints["gemma3"]).chat([["bad"], good], SamplingParams(max_tokens=8))
    second = tiny.open_llm(checkpoints["gemma3"]).chat([good, good], SamplingParams(max_tokens=8))
    assert first[1].token_ids == second[1].token_ids


def test_forward_does_not_move_the_seeds_of_later_requests(checkpoints):
    first, second = (tiny.open_llm(checkpoints["gemma3"]) for _ in range(2))
    first.forward([[5, 6]])
    assert first.generate([5], SamplingParams(max_tokens=8)).token_ids == \
        second.generate([5], SamplingParams(max_tokens=8)).token_ids


def test_threads_share_an_engine(checkpoints):
    fresh = tiny.open_llm(checkpoints["gemma3"])
    prompts = [[5 + i, 6] for i in range(6)]
    expected = [fresh.generate(prompt, greedy(max_tokens=12)).token_ids for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            got = list(pool.map(lambda prompt: fresh.generate(prompt, greedy(max_tokens=12)).token_ids, prompts))
            assert got == expected
    assert fresh.stats()["running"] == fresh.stats()["waiting"] == 0


def test_an_interrupt_anywhere_in_a_step_leaves_a_working_engine(checkpoints):
    """KeyboardInterrupt raised at every so many lines of the scheduler, the cache and the loop."""
    fresh = tiny.open_llm(checkpoints["gemma3"], kv_cache_bytes=tiny.kv_bytes_for(checkpoints["gemma3"], 2))
    prompts, params = [[5, 6, 7], [8, 9], [10]], greedy(max_tokens=6)
    expected = [output.token_ids for output in fresh.generate(prompts, params)]
    ours = ("scheduler.py", "kv_cache.py", "loop.py", "batch.py")
    for stop_at in range(3, 400, 23):
        n_lines = 0

        def trace(frame, event, _, stop_at=stop_at):
            nonlocal n_lines
            if frame.f_code.co_filename.endswith(ours) and "withdraw" not in frame.f_code.co_name:
                n_lines += event == "line"
                if n_lines == stop_at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace
        sys.settrace(trace)
        try:
            with pytest.raises(KeyboardInterrupt):
                fresh.generate(prompts, params)
        finally:
            sys.settrace(None)
        assert [output.token_ids for output in fresh.generate(prompts, params)] == expected
        assert all(pool["n_free"] == pool["n_pages"] for pool in fresh.stats()["pools"])


@pytest.mark.parametrize("generation, message", [
    ({"top_p": 0}, "generation_config.json: SamplingParams: top_p is 0"),
    ({"min_new_tokens": 20, "max_new_tokens": 10}, "generation_config.json: SamplingParams: min_tokens is 20"),
])
def test_a_generation_config_out_of_range_is_named(tmp_path, generation, message):
    with pytest.raises(ConfigError, match=message):
        tiny.open_llm(tiny.write(tmp_path / "c", "gemma3", generation=generation))


def test_a_least_length_in_the_generation_config_makes_room_for_itself(tmp_path):
    fresh = tiny.open_llm(tiny.write(tmp_path / "c", "gemma3", generation={"min_new_tokens": 20}))
    assert len(fresh.generate([5]).token_ids) == 20


def test_a_vocabulary_beyond_the_sampler_is_refused_at_the_door(tmp_path):
    with pytest.raises(ConfigError, match="vocab_size is 524288, the sampler takes at most 524287"):
        LLM(write_checkpoint(tmp_path / "c", flat("gemma3", vocab_size=2**19, hidden_size=2)), device="cpu")


@pytest.mark.parametrize("arguments", [{"seed": np.int64(3)}, {"max_seqs": np.int8(3)},
                                       {"max_batch_tokens": np.int32(5)}])
def test_numpy_ints_are_ints(checkpoints, arguments):
    output = tiny.open_llm(checkpoints["gemma3"], **arguments).generate([5], SamplingParams(max_tokens=4))
    assert len(output.token_ids) >= 1


@pytest.mark.parametrize("model", [None, 123, b"/tmp"])
def test_a_model_that_is_no_name(model):
    with pytest.raises(CheckpointError, match="model is of type"):
        LLM(model)
