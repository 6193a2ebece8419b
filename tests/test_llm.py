"""engine/llm.py, the public interface: arguments, forms of prompts, seeds, streams, chat, forward and the counters."""

import shutil

import numpy as np
import pytest

from engine import LLM, ConfigError, PromptError, RawgemError, SamplingParams
from tests import tiny_models as tiny
from tests.golden import assert_logits_close
from tests.tiny_models import greedy

PROMPT, OTHER = tiny.prompts(3, 9, 6)
GREEDY = greedy()
TEXT = "the cat is red"


@pytest.fixture
def fresh(checkpoints):
    """An engine nobody has asked anything."""
    return tiny.open_llm(checkpoints["gemma4"])


BAD_ARGUMENTS = {
    "device": ["gpu", "cpu:0", "cuda:x", None], "dtype": ["float16", "bfloat16", np.float32], "draft": [3],
    "n_draft_tokens": [-1, 17, "many"], "max_seq_len": [0, -1, 2.0, True, 129], "max_seqs": [0, 1.5, None, True],
    "max_batch_tokens": [0, "8"], "page_size": [0, -16, 16.0], "kv_cache_bytes": [0, 1.5], "seed": [-1, 1.0, None],
    "memory_fraction": [0, 1.1, "all", float("nan")], "graphs": ["yes"], "gemm": ["mine"], "draft_sampling": ["greedy"],
    "relaxed_acceptance": [0.5], "prefix_caching": ["on"], "progress": ["yes"],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD_ARGUMENTS.items() for value in values])
def test_a_bad_argument_is_named(checkpoints, name, value):
    with pytest.raises(ConfigError, match=name):
        LLM(checkpoints["gemma3"], **{"device": "cpu", "progress": False, name: value})


def test_what_does_not_fit_says_so(checkpoints):
    with pytest.raises(RawgemError, match="kv_cache_bytes"):
        tiny.open_llm(checkpoints["gemma3"], kv_cache_bytes=100)
    with pytest.raises(RawgemError, match="no such directory"):
        LLM("no such model")
    with pytest.raises(TypeError, match="max_sequences"):
        LLM(checkpoints["gemma3"], max_sequences=3)


# --- prompts and params

def test_every_form_of_one_prompt(llm):
    expected = llm.generate(PROMPT, GREEDY)
    for prompt in (tuple(PROMPT), np.array(PROMPT), np.array(PROMPT, np.uint8), iter(PROMPT), {"token_ids": PROMPT},
                   {"token_ids": tuple(PROMPT), "prompt": None, "images": None}, {"token_ids": PROMPT, "videos": []}):
        output = llm.generate(prompt, GREEDY)
        assert output.token_ids == expected.token_ids and output.prompt_token_ids == PROMPT
        assert all(type(token) is int for token in output.prompt_token_ids + output.token_ids)
    text = llm.generate(TEXT, GREEDY)
    assert text.prompt_token_ids == llm.tokenizer.encode(TEXT) and text.prompt_token_ids[0] == tiny.BOS
    assert llm.generate({"prompt": TEXT}, GREEDY).token_ids == text.token_ids
    assert text.text == llm.tokenizer.decode(text.token_ids) != ""
    assert text.finish_reason == "length" and text.error is None and text.logprobs is text.prompt_logprobs is None


def test_lists_keep_their_order(llm):
    prompts = [PROMPT, TEXT, {"prompt": TEXT}, {"token_ids": OTHER}, tuple(PROMPT)]
    outputs = llm.generate(prompts, GREEDY)
    assert [o.token_ids for o in outputs] == [llm.generate(prompt, GREEDY).token_ids for prompt in prompts]
    assert [o.token_ids for o in llm.generate((p for p in prompts), GREEDY)] == [o.token_ids for o in outputs]
    pair = [PROMPT, PROMPT[::-1]]
    assert [o.prompt_token_ids for o in llm.generate(np.array(pair), GREEDY)] == pair
    assert llm.generate([], GREEDY) == []
    assert len(llm.generate([PROMPT], GREEDY)) == 1


def test_params_none_takes_generation_config(tmp_path):
    defaults = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": 90}
    llm = tiny.open_llm(tiny.write(tmp_path / "m", "gemma3", generation=defaults))
    expected = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=5)).token_ids
    assert llm.generate(PROMPT).token_ids == llm.generate([PROMPT], [None])[0].token_ids == expected
    assert len(llm.generate(PROMPT, SamplingParams()).token_ids) == 16         # an explicit one is taken as written
    bad = tiny.write(tmp_path / "bad", "gemma3", generation={"top_p": 2.0})
    with pytest.raises(RawgemError, match=r"top_p is 2\.0"):
        tiny.open_llm(bad)


# --- seeds

def test_seeds(checkpoints):
    """A request's own seed decides alone; without one, the engine's seed and the number of the submission do."""
    drawn, seeded, reseeded = (SamplingParams(max_tokens=12, ignore_eos=True, seed=seed) for seed in (None, 9, 10))
    one, two, other = (tiny.open_llm(checkpoints["gemma4"], seed=seed) for seed in (4, 4, 5))
    first, second = one.generate([PROMPT, PROMPT], drawn)
    assert first.token_ids != second.token_ids
    assert [o.token_ids for o in two.generate([PROMPT, PROMPT], drawn)] == [first.token_ids, second.token_ids]
    assert [o.token_ids for o in other.generate([PROMPT, PROMPT], drawn)] != [first.token_ids, second.token_ids]
    third = one.generate(PROMPT, drawn).token_ids
    assert third not in (first.token_ids, second.token_ids)
    assert [token for piece in two.stream(PROMPT, drawn) for token in piece.token_ids] == third
    own = one.generate(PROMPT, seeded).token_ids
    assert own == other.generate([OTHER, PROMPT], seeded)[1].token_ids == one.generate(PROMPT, seeded).token_ids
    assert own != one.generate(PROMPT, reseeded).token_ids
    assert one.generate(PROMPT + own[:5], seeded).token_ids[:7] == own[5:]       # keyed by position, not by step


# --- streams

def test_pieces_add_up_to_the_output(llm):
    for prompt, params in ((TEXT, GREEDY), (TEXT, greedy(max_tokens=1)), (PROMPT, greedy(stop=["@", "long enough"])),
                           (PROMPT, SamplingParams(seed=1, max_tokens=30)), (OTHER, greedy(min_tokens=8, stop="a"))):
        output, pieces = llm.generate(prompt, params), list(llm.stream(prompt, params))
        assert "".join(piece.text for piece in pieces) == output.text
        assert [token for piece in pieces for token in piece.token_ids] == output.token_ids
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [output.finish_reason]
        assert len(pieces) == len(output.token_ids)                             # one a step


def test_streams_interleaved_with_each_other_and_with_calls(fresh):
    expected = {name: fresh.generate(prompt, GREEDY) for name, prompt in (("a", PROMPT), ("b", OTHER))}
    streams = {"a": fresh.stream(PROMPT, GREEDY), "b": fresh.stream(OTHER, GREEDY)}
    seen = {"a": [next(streams["a"]), next(streams["a"])], "b": [next(streams["b"])]}
    logits = fresh.forward([PROMPT, OTHER], return_logits="all").logits
    seen["a"].append(next(streams["a"]))
    assert fresh.stats()["running"] == 2
    assert fresh.generate([OTHER, PROMPT], greedy(max_tokens=20))[0].token_ids[:8] == expected["b"].token_ids
    for name, stream in streams.items():                        # generate has run both to their ends meanwhile
        seen[name] += stream
        assert "".join(piece.text for piece in seen[name]) == expected[name].text
        assert [token for piece in seen[name] for token in piece.token_ids] == expected[name].token_ids
        assert [piece.finish_reason for piece in seen[name]][-2:] == [None, "length"]
    for got, wanted in zip(logits, fresh.forward([PROMPT, OTHER], return_logits="all").logits, strict=True):
        assert_logits_close(got, wanted, 1e-5)


def test_a_stream_closed_early_is_an_abort(fresh):
    free = tiny.free_pages(fresh)
    stream = fresh.stream(PROMPT, GREEDY)
    next(stream)
    assert tiny.free_pages(fresh) != free and fresh.stats()["running"] == 1
    stream.close()
    assert tiny.free_pages(fresh) == free
    stats = fresh.stats()
    assert (stats["requests"], stats["aborted"], stats["finished"], stats["running"]) == (1, 1, 0, 0)
    assert list(stream) == []


def test_a_stream_checks_at_the_call_and_runs_at_the_first_piece(fresh):
    with pytest.raises(PromptError):
        fresh.stream([])
    stream = fresh.stream(PROMPT, GREEDY)
    assert fresh.stats()["steps"] == 0 and fresh.stats()["waiting"] == 0
    assert len(list(stream)) == 8


def test_stats_count(fresh):
    fresh.generate([PROMPT, OTHER, []], GREEDY)
    list(fresh.stream(PROMPT, GREEDY))
    fresh.forward([PROMPT])
    stats = fresh.stats()
    assert (stats["requests"], stats["finished"], stats["errors"], stats["aborted"]) == (4, 3, 1, 0)
    assert stats["prompt_tokens"] == 2 * len(PROMPT) + len(OTHER) and stats["generated_tokens"] == 24
    assert stats["steps"] == 8 + 8 + 1 and stats["preemptions"] == stats["running"] == stats["waiting"] == 0


# --- chat

def test_chat_is_generate_on_the_rendered_prompt(llm):
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "is"},
                {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "cat"}]}]
    text = "<bos><turn>user the cat<turn>assistant is<turn>user a cat<turn>model "
    expected = llm.generate(llm.tokenizer.encode(text, add_special_tokens=False), GREEDY)
    output = llm.chat(messages, GREEDY)
    assert output.prompt_token_ids == expected.prompt_token_ids and output.prompt_token_ids.count(tiny.BOS) == 1
    assert output.text == expected.text and output.token_ids == expected.token_ids
    outputs = llm.chat([messages, [{"role": "user"}], messages[:1]], [GREEDY, GREEDY, greedy(max_tokens=3)])
    assert outputs[0].text == expected.text and outputs[1].finish_reason == "error" and len(outputs[2].token_ids) == 3
    assert isinstance(outputs[1].error, PromptError)


@pytest.mark.parametrize("messages", ["hello", [], None, 5, [{"role": "user"}], [{"content": "a"}], {"role": "user"},
                                      [{"role": "user", "content": "a"}, "b"]])
def test_bad_messages(llm, messages):
    with pytest.raises(PromptError):
        llm.chat(messages, GREEDY)


def test_chat_without_a_template(checkpoints, tmp_path):
    path = shutil.copytree(checkpoints["gemma3"], tmp_path / "m")
    (path / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    with pytest.raises(PromptError, match="no chat template"):
        tiny.open_llm(path).chat([{"role": "user", "content": "a"}])


# --- forward

def test_forward_returns_what_is_asked_for(llm):
    rows = [PROMPT, OTHER, [8]]
    whole = llm.forward(rows, return_logits="all")
    assert [logits.shape for logits in whole.logits] == [(9, 96), (6, 96), (1, 96)] and whole.hidden_states is None
    assert all(logits.dtype == np.float32 for logits in whole.logits)
    for wanted, n in (("last", 1), (1, 1), (4, 4), (100, 100), (np.int64(2), 2)):
        for part, logits in zip(llm.forward(rows, return_logits=wanted).logits, whole.logits, strict=True):
            assert part.shape == (min(n, len(logits)), 96)
            assert_logits_close(part, logits[-n:], 1e-5)
    assert llm.forward([]).logits == []
    array = llm.forward(np.array([OTHER]), images=[None], videos=None)
    assert_logits_close(array.logits[0], whole.logits[1][-1:], 1e-5)


def test_hidden_states_lead_to_the_logits(llm):
    layers = llm.forward([PROMPT, OTHER], return_hidden_states="layers").hidden_states
    final = llm.forward([PROMPT, OTHER], return_logits="all", return_hidden_states=True)
    assert [states.shape for states in layers] == [(5, 9, 32), (5, 6, 32)]
    assert [states.shape for states in final.hidden_states] == [(9, 32), (6, 32)]
    cap, w = llm.spec.logit_softcap, llm.weights
    for all_layers, states, logits, ids in zip(layers, final.hidden_states, final.logits, [PROMPT, OTHER], strict=True):
        assert_logits_close(all_layers[0], np.asarray(w.embed)[ids] * np.float32(llm.spec.embed_scale), 1e-6)
        x = all_layers[-1]
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(llm.spec.norm_eps))
        assert_logits_close(x * w.norm, states, 1e-5)
        assert_logits_close(logits, cap * np.tanh(states @ np.asarray(w.head).T / cap), 1e-5)


def test_forward_leaves_open_streams_and_pools_alone(checkpoints):
    llm = tiny.open_llm(checkpoints["gemma4"], max_batch_tokens=5, page_size=2)
    expected = llm.generate(PROMPT, GREEDY).token_ids
    free = tiny.free_pages(llm)
    llm.forward([PROMPT, OTHER])
    assert tiny.free_pages(llm) == free
    stream = llm.stream(PROMPT, GREEDY)
    tokens = list(next(stream).token_ids)
    llm.forward([PROMPT, OTHER, PROMPT], return_logits="all", return_hidden_states="layers")
    tokens += [token for piece in stream for token in piece.token_ids]
    assert tokens == expected and tiny.free_pages(llm) == free


@pytest.mark.parametrize("arguments", [{"return_logits": 0}, {"return_logits": -1}, {"return_logits": "first"},
                                       {"return_logits": True}, {"return_logits": 1.5}, {"return_logits": None},
                                       {"return_hidden_states": "all"}, {"return_hidden_states": 3}])
def test_forward_names_bad_arguments(llm, arguments):
    name, = arguments
    with pytest.raises(ConfigError, match=name):
        llm.forward([PROMPT], **arguments)


@pytest.mark.parametrize("rows", [[[]], [PROMPT, [96]], [[-1]], [[True]], [[8.0]], PROMPT, [None], ["text"], 5, None,
                                  [b"ab"]])
def test_forward_refuses_bad_rows(llm, rows):
    with pytest.raises(PromptError):
        llm.forward(rows)


def test_forward_refuses_images(llm):
    with pytest.raises(PromptError, match="images"):
        llm.forward([PROMPT], images=[["cat.png"]])
    with pytest.raises(PromptError, match="images and videos"):
        llm.forward([PROMPT], videos=[[object()]])
