"""Whole models on device "cuda", on a stand-in for CuPy: the emulated lane's bits, graphs that change nothing, and
steps that allocate nothing, copy in once and read back once."""

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engine import LLM, SamplingParams, step_inputs
from engine.errors import MemoryPlanError
from engine.kernels import cublas
from engine.workspace import MOST_TOP
from tests import stand_in
from tests import tiny_models as tiny
from tests.golden import Golden
from tests.kernels.test_cublas import gemm_ex

CASES = ("gemma3-text", "gemma4-dense", "gemma4-moe", "gemma4-e", "llama4-text")
GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)
# Two whose logits are edited, one with none but its temperature, one greedy.
MIXED = [SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.3, seed=1, ignore_eos=True, max_tokens=8),
         SamplingParams(temperature=1.2, top_k=20, seed=2, ignore_eos=True, max_tokens=6, logit_bias={5: 2.0}),
         SamplingParams(seed=3, ignore_eos=True, max_tokens=7), GREEDY]


def open_llm(case, device="cuda", **arguments):
    return LLM(Golden(case).checkpoint, device=device, **{"max_seq_len": 256, "max_seqs": 8, "max_batch_tokens": 64,
                                                          "progress": False, **arguments})


def prompts_of(case, n=4):
    return [prompt[:20] for prompt in Golden(case).prompts[:n]]


def watch(llm, look):
    """[look(batch, n before)] of every step from now on; look is called when the step is done."""
    runner, seen = llm._core.step, []
    run = runner.run

    def watched(batch):
        before = stand_in._gpu.counts.copy()
        out = run(batch)
        seen.append(look(batch, before))
        return out
    runner.run = watched
    return seen


def counts_of(batch, before):
    return batch.is_decode, len(batch.to_sample), stand_in._gpu.counts - before


# --- the same bits

@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_emulated_lane(gpu, case):
    """The same kernels on the same arguments: whatever is uploaded, copied or launched otherwise would show."""
    prompts = prompts_of(case)
    pairs = [open_llm(case, device).forward(prompts, return_logits="all", return_hidden_states="layers")
             for device in ("cuda", "emulated")]
    for name in ("logits", "hidden_states"):
        for got, expected in zip(*(getattr(pair, name) for pair in pairs), strict=True):
            np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_emulated_lane_with_graphs_and_without(gpu, case):
    prompts = prompts_of(case)
    expected = [output.token_ids for output in open_llm(case, "emulated").generate(prompts, MIXED)]
    for graphs in (True, False):
        llm = open_llm(case, graphs=graphs)
        for _ in range(2):
            assert [output.token_ids for output in llm.generate(prompts, MIXED)] == expected
        assert not llm.graphs.failures and bool(gpu.counts["replays"]) == graphs
        gpu.counts.clear()


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_leave_the_logits_of_eager_ones(gpu, case):
    """Bit for bit after every step, over buckets that fill, overflow and shrink as requests come and go."""
    def logits_of(llm):
        def look(batch, before):
            workspace = llm._core.step.workspace
            with llm.lane.running():
                return llm.lane.to_host(workspace.rows("logits", len(batch.to_sample), llm.spec.vocab)).copy()
        return watch(llm, look)
    seen = []
    for graphs in (True, False):
        llm = open_llm(case, graphs=graphs)
        seen.append(logits_of(llm))
        llm.generate(prompts_of(case), MIXED)
        llm.generate(prompts_of(case, 3), GREEDY)
        assert bool(gpu.counts["replays"]) == graphs
        gpu.counts.clear()
    for replayed, eager in zip(*seen, strict=True):
        np.testing.assert_array_equal(replayed.view(np.uint32), eager.view(np.uint32))


# --- what a step does to the GPU

# Experts count on the device, and rows of a table on the host travel with the other inputs.
@pytest.mark.parametrize("case, ple", [(CASES[0], "device"), ("gemma4-moe", "device"), ("gemma4-e", "host")])
def test_a_replayed_step_is_one_copy_one_graph_one_read_back(gpu, case, ple):
    llm = open_llm(case, ple=ple)
    llm.generate(prompts_of(case), GREEDY)
    seen = watch(llm, counts_of)
    llm.generate(prompts_of(case), GREEDY)
    decodes = [counts for is_decode, _, counts in seen if is_decode]
    assert len(decodes) >= GREEDY.max_tokens - 1
    assert all(counts == {"copies in": 1, "replays": 1, "copies out": 1, "waits": 1} for counts in decodes), decodes


@pytest.mark.parametrize("case, ple", [(CASES[0], "device"), ("llama4-text", "device"), ("gemma4-e", "host")])
def test_an_eager_step_allocates_nothing_copies_in_once_and_reads_back_once(gpu, case, ple):
    llm = open_llm(case, graphs=False, ple=ple)
    llm.generate(prompts_of(case), GREEDY)
    seen = watch(llm, counts_of)
    llm.generate(prompts_of(case), GREEDY)
    for _, n_sampled, counts in seen:
        assert counts.pop("launches") > 0
        read = {"copies out": 1, "waits": 1} if n_sampled else {}
        assert counts == {"copies in": 1, **read}


def test_steps_of_many_edits_are_replayed_too(gpu, monkeypatch):
    """Two sequences with penalties whose text outgrows the room of the first graphs, beside one without edits and one
    with so many that they outgrow the buffer."""
    monkeypatch.setattr(step_inputs, "EDITS_A_ROW", 8)
    prompts, arguments = prompts_of(CASES[0]), {"repetition_penalty": 1.4, "ignore_eos": True, "max_tokens": 24}
    params = [SamplingParams(temperature=0, **arguments), SamplingParams(seed=1, **arguments), GREEDY,
              SamplingParams(temperature=0, ignore_eos=True, max_tokens=8, logit_bias=dict.fromkeys(range(500), 0.5))]
    expected = [output.token_ids for output in open_llm(CASES[0], graphs=False).generate(prompts, params)]
    llm = open_llm(CASES[0])
    for _ in range(2):
        seen, size = watch(llm, counts_of), len(llm._core.step._stager._decode_buffer.host)
        assert [output.token_ids for output in llm.generate(prompts, params)] == expected
    decodes = [counts for is_decode, _, counts in seen if is_decode]
    assert all(counts == {"copies in": 1, "replays": 1, "copies out": 1, "waits": 1} for counts in decodes), decodes
    assert "4 with 2048 edits" in str(llm.graphs) and "2 with 64 edits" in str(llm.graphs)
    assert size > len(open_llm(CASES[0])._core.step._stager._decode_buffer.host)


@pytest.mark.parametrize("most_drafts", [0, 3])
def test_the_planned_buffer_has_room_for_the_edits_of_every_graph(gpu, most_drafts):
    case = "gemma4-assistant-dense" if most_drafts else CASES[0]
    draft = Golden(case).checkpoint.parent / "assistant"
    llm = open_llm(case, **({"draft": draft, "n_draft_tokens": most_drafts} if most_drafts else {}))
    stager, graphs = llm._core.step._stager, llm.graphs
    planned = stager._decode_buffer
    for n_seqs in graphs.sizes:
        for n_drafts in graphs._draft_sizes:
            stager.decode(n_seqs, n_drafts, n_seqs * (1 + n_drafts) * step_inputs.EDITS_A_ROW)
    assert stager._decode_buffer is planned


def test_how_much_room_edits_get():
    assert [step_inputs.edits_room(2, n) for n in (0, 1, 1024, 1025, 4096, 4097, 70000)] == [
        0, 1024, 1024, 4096, 4096, 16384, 262144]


def test_explain_tells_of_graphs(gpu):
    llm = open_llm(CASES[0])
    llm.generate(prompts_of(CASES[0], 2), GREEDY)
    assert "CUDA graphs: 2 of 1, 2, 4, 8 sequences captured" in llm.explain()
    assert "CUDA graphs: off" in open_llm(CASES[0], graphs=False).explain()


# --- an engine on a GPU

def test_threads_share_an_engine(gpu):
    prompts = prompts_of(CASES[0])
    llm = open_llm(CASES[0])
    expected = [llm.generate(prompt, GREEDY).token_ids for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert [output.token_ids for output in pool.map(lambda p: llm.generate(p, GREEDY), prompts)] == expected


def test_auto_takes_the_gpu(gpu):
    assert open_llm(CASES[0], "auto").lane.name == "cuda"


def test_the_second_gpu():
    with stand_in.installed(n_devices=2):
        prompt = prompts_of(CASES[0])[0]
        assert open_llm(CASES[0], "cuda:1").generate(prompt, GREEDY).token_ids == open_llm(
            CASES[0], "emulated").generate(prompt, GREEDY).token_ids


def test_the_plan_is_that_of_the_gpus_memory(gpu):
    """Not of this machine's; and a model that does not fit says so before anything is allocated."""
    llm = open_llm(CASES[0], memory_fraction=0.5)
    assert llm.plan().memory_bytes <= stand_in.TOTAL_BYTES // 2
    assert gpu.n_live_bytes <= stand_in.TOTAL_BYTES // 2
    before = gpu.counts.copy()
    with pytest.raises(MemoryPlanError):
        open_llm(CASES[0], memory_fraction=0.001)
    assert gpu.counts["allocations"] == before["allocations"]


def test_an_engine_that_was_dropped_leaves_its_memory_to_the_next(gpu):
    plans = []
    gc.disable()
    try:
        for _ in range(2):
            llm = open_llm(CASES[0])
            llm.forward([prompts_of(CASES[0])[0]])
            plans.append(llm.plan().memory_bytes)
            del llm
    finally:
        gc.enable()
    assert plans[0] == plans[1]


def test_a_step_interrupted_leaves_an_engine_that_goes_on(gpu):
    """Ctrl-C in the middle of a capture: the stream leaves it, the request ends, the next one runs."""
    llm, prompt = open_llm(CASES[0]), prompts_of(CASES[0])[0]
    expected = open_llm(CASES[0]).generate(prompt, GREEDY).token_ids
    logits = llm._core.step.layers.logits

    def interrupted(states):
        if gpu.capturing:
            raise KeyboardInterrupt
        return logits(states)
    llm._core.step.layers.logits = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompt, GREEDY)
    llm._core.step.layers.logits = logits
    assert llm.generate(prompt, GREEDY).token_ids == expected and not llm.graphs.failures


def test_more_logprobs_than_the_lane_finds(gpu, tmp_path):
    """They are found on the host, from logits that are brought there."""
    path = tiny.write(tmp_path / "c", "gemma3", with_text=False, vocab_size=MOST_TOP + 100)
    params = [SamplingParams(temperature=0, max_tokens=3, n_logprobs=n, prompt_logprobs=n, ignore_eos=True)
              for n in (2, MOST_TOP + 50)]
    got, wanted = ([(output.token_ids, output.logprobs, output.prompt_logprobs)
                    for output in LLM(path, device=device, max_seq_len=32).generate([[3, 4, 5]] * 2, params)]
                   for device in ("cuda", "emulated"))
    assert got == wanted


class Product:
    """A call of cuBLAS, waiting in a stream."""

    def __init__(self, args):
        self.args = args

    def run(self):
        gemm_ex(*self.args)


def test_cublas(gpu, monkeypatch):
    """The matrix products by cuBLAS, here a product in NumPy: the golden stays as close, and nothing is captured."""
    monkeypatch.setattr(cublas, "gemm_ex", lambda *args: stand_in._queue(None).put(Product(args)))
    golden = Golden("gemma4-dense")
    llm = open_llm("gemma4-dense", gemm="cublas")
    logits = llm.forward(golden.prompts[:2], return_logits="all").logits
    for i, got in enumerate(logits):
        want = golden[f"p{i}.logits"]
        assert np.median(np.abs(got - want).max(axis=1) / np.abs(want).max(axis=1)) < 0.033
    llm.generate(prompts_of("gemma4-dense"), GREEDY)
    assert "CUDA graphs: off (cuBLAS cannot be captured)" in llm.explain()
    assert "matrix products: cuBLAS" in llm.explain() and gpu.counts["replays"] == 0
