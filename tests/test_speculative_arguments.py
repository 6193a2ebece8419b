"""The arguments of LLM about drafts: what is refused and why, what is loaded, planned and told; the command line."""

import json
import shutil
from pathlib import Path

import pytest

from engine import LLM, CheckpointError, ConfigError, MemoryPlanError, SamplingParams, plan
from engine.assistant import Assistant
from engine.assistant_weights import weights_bytes
from engine.cli import main
from engine.config import EngineConfig
from engine.draft_length import AUTO_DRAFTS
from engine.kernels import cublas
from engine.prompts import as_prompt
from tests import stand_in
from tests import tiny_models as tiny
from tests.golden import GOLDENS
from tests.test_cuda_llm import Product
from tests.tiny_draft import add_thinking, write_draft
from tests.tiny_models import greedy

CASES = ("gemma4-assistant", "gemma4-assistant-dense")
ARGUMENTS = {"device": "cpu", "progress": False, "max_seq_len": 96, "max_seqs": 4}
RELAXED = {"top_k": 4, "delta": 0.5}


def golden(case):
    """(target, draft) of a golden."""
    return GOLDENS / case / "checkpoint", GOLDENS / case / "assistant"


def opened(case=CASES[0], **arguments):
    target, draft = golden(case)
    return LLM(target, **{"draft": draft, **ARGUMENTS, **arguments})


@pytest.fixture
def edited(tmp_path):
    """edited(section, **fields): a copy of a golden's draft with fields of its config.json changed."""
    def edit(section=None, **fields):
        path = tmp_path / "edited"
        shutil.copytree(golden(CASES[0])[1], path, copy_function=shutil.copyfile)
        config = json.loads((path / "config.json").read_text())
        (config[section] if section else config).update(fields)
        (path / "config.json").write_text(json.dumps(config))
        return path
    return edit


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """(target, draft) of a tiny model whose tokenizer knows the marks of thinking."""
    root = tmp_path_factory.mktemp("thinking")
    target = tiny.write(root / "target", "gemma4", vocab_size=104)
    add_thinking(target)
    return target, write_draft(root / "draft", target)


# --- what is refused at the door

@pytest.mark.parametrize("arguments, message", [
    ({"n_draft_tokens": 17}, "n_draft_tokens is 17, expected an int from 0 to 16, or 'auto'"),
    ({"n_draft_tokens": -1}, "n_draft_tokens is -1"), ({"n_draft_tokens": True}, "n_draft_tokens is True"),
    ({"n_draft_tokens": "many"}, "n_draft_tokens is 'many'"), ({"n_draft_tokens": 2.0}, "n_draft_tokens is 2.0"),
    ({"draft": 3}, "draft is of type int, expected a checkpoint directory or a Hugging Face repo id"),
    ({"draft_sampling": "greedy"}, "draft_sampling is 'greedy', expected one of 'argmax', 'sample'"),
    ({"relaxed_acceptance": RELAXED}, "relaxed_acceptance is about drafted tokens: it needs a draft model"),
    ({"draft": "d", "relaxed_acceptance": {"k": 1}}, "relaxed_acceptance is {'k': 1}, expected None or a dict"),
    ({"draft": "d", "relaxed_acceptance": RELAXED, "draft_sampling": "sample"},
     "relaxed_acceptance does not go with draft_sampling='sample'"),
])
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**arguments)


def test_how_many_at_most():
    assert EngineConfig().most_drafts == EngineConfig(draft="d", n_draft_tokens=0).most_drafts == 0
    assert EngineConfig(draft="d").most_drafts == 4 and EngineConfig(draft="d", max_seqs=3).max_slots == 15
    assert EngineConfig(draft=Path("d"), n_draft_tokens="auto").most_drafts == AUTO_DRAFTS
    assert EngineConfig(n_draft_tokens="auto", max_seqs=3).max_slots == 3


@pytest.mark.parametrize("section, fields, message", [
    (None, {"backbone_hidden_size": 32}, "config.json: backbone_hidden_size is 32, expected 64, the target's hidden"),
    ("text_config", {"vocab_size": 320}, "config.json: text_config.vocab_size is 320, expected 384, the target's"),
    ("text_config", {"num_key_value_heads": 2}, "has 2 KV heads, layer 2 of the target, whose K and V it reads, has 1"),
    ("text_config", {"head_dim": 16}, "has heads of 16, layer 2 of the target, whose K and V.* has heads of 32"),
    ("text_config", {"global_head_dim": 128}, "has heads of 128, layer 1 of the target"),
    ("text_config", {"sliding_window": 8}, "has a window of 8, layer 2 of the target.* a window of 16"),
    ("text_config", {"attention_k_eq_v": True}, "attention_k_eq_v True"),
    (None, {"model_type": "gemma4"}, "model_type"),
])
def test_a_draft_for_another_target_says_which_field(edited, section, fields, message):
    path = edited(section, **fields)
    for refused in (lambda: opened(draft=path), lambda: plan(golden(CASES[0])[0], draft=path, device="cpu")):
        with pytest.raises(ConfigError, match=message) as caught:
            refused()
        assert str(caught.value).startswith(f"draft {path}: ") and "\n" not in str(caught.value)


def test_what_is_no_draft_and_what_has_none(checkpoints, tmp_path):
    target, draft = golden(CASES[0])
    for path, message in ((target, "this is no draft model"), (tmp_path, "config.json")):
        with pytest.raises((ConfigError, CheckpointError), match=message) as caught:
            opened(draft=path)
        assert str(caught.value).startswith(f"draft {path}: ")
    for name in ("gemma3", "llama4"):
        with pytest.raises(ConfigError, match=f"reads the K and V of a Gemma 4 model, the target is {name}"):
            tiny.open_llm(checkpoints[name], draft=draft)
    with pytest.raises(ConfigError, match="drafts for another, pass it as `draft`"):
        LLM(draft, **ARGUMENTS)
    with pytest.raises(CheckpointError, match="draft: 'no such draft': no such directory"):
        opened(draft="no such draft")


def test_tensors_of_a_draft_that_are_not_there(edited):
    """Said before the target's weights are read."""
    path = edited("text_config", intermediate_size=48)
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj\.weight is \[.*expected \[.*48"):
        opened(draft=path)


def test_relaxed_acceptance_needs_the_marks(checkpoints, tmp_path):
    with pytest.raises(ConfigError, match=r"between <\|channel> and <channel\|>: the checkpoint has no tokenizer"):
        opened(relaxed_acceptance=RELAXED)
    draft = write_draft(tmp_path / "draft", checkpoints["gemma4"])
    with pytest.raises(ConfigError, match="the tokenizer lacks these tokens; leave it None"):
        tiny.open_llm(checkpoints["gemma4"], draft=draft, relaxed_acceptance=RELAXED)


# --- what is loaded, planned and told

@pytest.mark.parametrize("case", CASES)
def test_the_plan_counts_the_draft(case):
    target, draft = golden(case)
    arguments = {key: value for key, value in ARGUMENTS.items() if key != "progress"}
    llm = opened(case)
    spec, it = llm._core.draft.spec, llm.plan()
    assert it.draft_bytes == weights_bytes(spec, 4)
    assert it.draft_workspace_bytes >= Assistant.n_bytes(spec, 4, 4)
    told = plan(target, draft=draft, memory_bytes=64e6, **arguments)
    without = plan(target, memory_bytes=64e6, **arguments)
    assert (told.draft_bytes, told.draft_workspace_bytes) == (it.draft_bytes, it.draft_workspace_bytes)
    assert told.workspace_bytes - without.workspace_bytes >= 4 * 4 * spec.vocab * 4         # four slots more a sequence
    assert told.free_bytes == told.memory_bytes - sum((
        told.weights_bytes, told.workspace_bytes, told.vision_bytes, told.encoder_cache_bytes, told.draft_bytes,
        told.draft_workspace_bytes, told.kv_bytes))
    assert "\ndraft model " in str(told) and "draft" not in str(without)
    assert without.draft_bytes == without.draft_workspace_bytes == 0
    more = [plan(target, draft=draft, **arguments, **options).draft_workspace_bytes
            for options in ({}, {"draft_sampling": "sample"})]
    assert more[0] < more[1]


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("arguments", [
    {}, {"draft_sampling": "sample"}, {"relaxed_acceptance": RELAXED, "n_draft_tokens": 0},
    {"max_seqs": 300, "max_batch_tokens": 20, "n_draft_tokens": "auto", "draft_sampling": "sample"}])
def test_the_plan_counts_what_is_taken(thinking, device, arguments):
    target, draft = thinking
    llm = tiny.open_llm(target, draft=draft, **{"device": device, "max_seqs": 3, **arguments})
    core, it = llm._core, llm.plan()
    own = [*core.workspace._buffers.values(), *core.workspace.scratch]
    stager = core.step._stager
    assert it.workspace_bytes == sum(array.nbytes for array in own) + (stager._buffer.device.nbytes if stager else 0)
    drafting = core.draft.workspace
    assert drafting.scratch is core.workspace.scratch
    taken = [*drafting._buffers.values(), *core.step.speculation._buffers._buffers.values(),
             core.step.speculation._counts]
    assert it.draft_workspace_bytes == sum(array.nbytes for array in taken)


def test_a_draft_that_does_not_fit(checkpoints):
    target, draft = golden(CASES[0])
    needed = plan(target, device="cpu", max_seq_len=96, memory_bytes=1e9, memory_fraction=1.0)
    tight = needed.memory_bytes - needed.free_bytes - needed.kv_bytes + 200_000
    plan(target, device="cpu", max_seq_len=96, memory_bytes=tight, memory_fraction=1.0)
    with pytest.raises(MemoryPlanError, match="n_draft_tokens"):
        plan(target, draft=draft, device="cpu", max_seq_len=96, memory_bytes=tight, memory_fraction=1.0)


@pytest.mark.parametrize("n, words", [(0, "drafts for a sequence 0 tokens"), (3, "drafts for a sequence 3 tokens"),
                                      ("auto", "drafts for a sequence up to 8 tokens, as many as its acceptance")])
def test_explain_and_stats(n, words):
    llm = opened(n_draft_tokens=n)
    told = llm.explain()
    assert words in told and "LOSSY" not in told
    assert "  2 layers: sliding(16) attention, 4 query and 1 KV heads of 32, K and V of layer 2 of the target; dense " \
           "MLP 64\n  1 layer: global attention" in told
    assert "  head: the tokens of 6 of 32 centroids\n  draft_sampling: the likeliest tokens are drafted" in told
    assert "no drafted token was checked in 0 steps" in told
    output = llm.generate([[2, 5, 9], [2, 7]], greedy(max_tokens=12))
    counts = llm.stats()["drafts"]
    assert counts["steps"] + counts["accepted"] >= sum(len(one.token_ids) for one in output)
    assert counts["checks"] <= counts["steps"] and len(counts["acceptance"]) <= llm.config.most_drafts
    assert (counts["drafted"] > 0) == (n != 0)
    if counts["checks"]:
        assert f"  {counts['accepted']} of {counts['drafted']} drafted tokens accepted in " in llm.explain()
    plain = LLM(golden(CASES[0])[0], **ARGUMENTS)
    assert "draft: none" in plain.explain() and "drafts" not in plain.stats()


def test_explain_says_what_is_lossy(thinking):
    target, draft = thinking
    llm = tiny.open_llm(target, draft=draft, relaxed_acceptance=RELAXED)
    assert "  relaxed_acceptance: LOSSY. While the model thinks, sampled text takes a drafted token that is among " \
           "the 4 likeliest and at most 0.5 less probable than the likeliest" in llm.explain()
    sampled = tiny.open_llm(target, draft=draft, draft_sampling="sample").explain()
    assert "draft_sampling: tokens are drawn and kept by the ratio of probabilities" in sampled
    assert "LOSSY" in LLM.__doc__


def test_relaxed_requests_begin_as_their_prompt_says(thinking):
    target, draft = thinking
    llm = tiny.open_llm(target, draft=draft, relaxed_acceptance=RELAXED)
    seen = []
    for prompt in ("the cat <|channel>", "the cat <|channel>is<channel|>", "the cat"):
        task = llm._admit(prompt, SamplingParams(), as_prompt)[1]
        seen.append(task.relaxed([5]))
    assert seen == [[True], [False], [False]]


def test_a_new_engine_warns_of_a_draft_that_never_holds(monkeypatch):
    """The text is the target's all the same."""
    monkeypatch.setattr("engine.draft_health.ENOUGH", 8)
    monkeypatch.setattr("engine.draft_health.TOO_FEW", 1.1)
    llm, plain = opened(n_draft_tokens=2), LLM(golden(CASES[0])[0], **ARGUMENTS)
    with pytest.warns(RuntimeWarning, match="first drafted tokens"):
        output = llm.generate([2, 5, 9], greedy(max_tokens=40))
    assert output.token_ids == plain.generate([2, 5, 9], greedy(max_tokens=40)).token_ids


# --- the command line

def test_the_command_line(capsys, thinking):
    target, draft = map(str, thinking)
    common = ["--device", "cpu", "--max-seq-len", "96", "--draft", draft]
    assert main(["generate", target, *common, "--n-draft-tokens", "2", "--prompt", "the cat", "--max-tokens", "4",
                 "--temperature", "0", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "draft: 3 layers, hidden 16; a step drafts for a sequence 2 tokens" in out
    assert main(["plan", target, *common, "--n-draft-tokens", "auto", "--draft-sampling", "sample"]) == 0
    assert "\ndraft model " in capsys.readouterr().out
    for given in ("17", "-1", "many"):
        assert main(["plan", target, *common, "--n-draft-tokens", given]) == 2
        assert "n_draft_tokens is " in capsys.readouterr().err


def test_inspect_lists_the_draft_of_a_target(capsys, edited):
    target, draft = golden(CASES[0])
    assert main(["inspect", str(target), "--draft", str(draft)]) == 0
    out = capsys.readouterr().out
    assert "token_ordering" in out and "draft: 3 layers, hidden 32, reading layers 2, 2, 1 of the target" in out
    assert main(["inspect", str(target), "--draft", str(edited("text_config", intermediate_size=48))]) == 1
    assert "problem: model.layers.0.mlp.gate_proj.weight is [64, 32], expected [48, 32]" in capsys.readouterr().out
    assert main(["inspect", str(draft)]) == 2


# --- beside other arguments

@pytest.mark.parametrize("draft_sampling", ["argmax", "sample"])
def test_matrix_products_by_cublas(gpu, monkeypatch, draft_sampling):
    """Another table of ops under the same steps, on a stand-in."""
    monkeypatch.setattr(cublas, "gemm_ex", lambda *args: stand_in._queue(None).put(Product(args)))
    target, draft = golden(CASES[1])
    arguments = {**ARGUMENTS, "device": "cuda", "gemm": "cublas"}
    llm = LLM(target, draft=draft, draft_sampling=draft_sampling, **arguments)
    got, expected = (it.generate([[2, 5, 9, 13], [2, 7]], greedy()) for it in (llm, LLM(target, **arguments)))
    assert [one.token_ids for one in got] == [one.token_ids for one in expected]
    assert llm.stats()["drafts"]["drafted"] > 0 and "but for what cuBLAS rounds otherwise" in llm.explain()
