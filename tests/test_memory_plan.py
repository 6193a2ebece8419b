"""engine/memory_plan.py: what fits is computed from config.json alone, holds what it promises, and never exceeds it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import LLM, memory_plan, plan
from engine.backend import HostLane
from engine.config import EngineConfig
from engine.errors import ConfigError, MemoryPlanError
from engine.kv_cache import KVCache
from engine.memory_plan import host_memory_left, plan_memory
from engine.models import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, RopeSpec, describe
from engine.models.presets import preset
from engine.models.vision_spec import MediaSpec, SiglipSpec
from engine.sequence import Sequence
from loaders.config import Config
from tests import tiny
from tests.released import N_SCALARS, N_VISION, RELEASED

MiB = 2**20


@pytest.fixture
def directory(tmp_path):
    """put(config): a directory with that config.json and nothing else."""
    def put(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path
    return put


def by_kind(a_plan):
    return {pool.kind.partition("(")[0]: pool for pool in a_plan.pools}


# --- released models, from their config.json alone

# K and V of one sequence in all local layers at the length of the window or chunk, MiB: from the dimensions of each
# model. GPUs of 141 GB that it needs; where the longest sequence does not fit them, test_longest_sequence... has more.
LOCAL_MIB = {"gemma-3-270m": 7.5, "gemma-3-1b": 11, "gemma-3-4b": 116, "gemma-3-12b": 320, "gemma-3-27b": 416,
             "gemma-4-e2b": 6, "gemma-4-e4b": 20, "gemma-4-12b": 320, "gemma-4-26b-a4b": 200, "gemma-4-31b": 800,
             "llama-4-scout": 1152, "llama-4-maverick": 1152}
N_GPUS = {"llama-4-scout": 6, "llama-4-maverick": 8}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_with_their_longest_sequence(directory, name):
    """On one GPU, but for Llama 4: the 10 million tokens of Scout take 515 GB beside 216 GB of weights."""
    released, memory_bytes = RELEASED[name], N_GPUS.get(name, 1) * 141e9
    got = plan(directory(released.config), device="cuda", memory_bytes=memory_bytes)
    pools = by_kind(got)
    local, = set(pools) - {"global"}
    assert got.weights_bytes == 2 * (released.n_params + N_VISION.get(name, 0) + N_SCALARS.get(name, 0))
    assert pools["global"].token_bytes == released.global_token_bytes
    assert pools[local].token_bytes == released.n_owners[1] * released.local_token_bytes
    assert pools[local].token_bytes * released.reach == LOCAL_MIB[name] * MiB
    assert pools[local].kind == f"{'chunked' if name.startswith('llama') else 'sliding'}({released.reach})"
    assert got.max_seq_len == released.max_positions
    assert got.n_full_seqs >= 1
    assert got.memory_bytes == int(0.9 * memory_bytes)
    vision_bytes = got.vision_bytes + got.encoder_cache_bytes
    assert (vision_bytes > 0) == (name in N_VISION)
    assert got.weights_bytes + got.kv_bytes + got.workspace_bytes + vision_bytes + got.free_bytes == got.memory_bytes
    assert got.free_bytes >= 0


@pytest.mark.parametrize("name", RELEASED)
def test_presets_are_planned_by_name(directory, name):
    arguments = {"device": "cuda", "memory_bytes": N_GPUS.get(name, 1) * 141e9}
    assert plan(name, **arguments) == plan(directory(RELEASED[name].config), **arguments)


def test_a_directory_goes_before_a_preset_of_its_name(directory, monkeypatch):
    path = directory(tiny.flat("gemma3"))
    monkeypatch.chdir(path)
    (path / "gemma-3-1b").mkdir()
    (path / "config.json").rename(path / "gemma-3-1b/config.json")
    assert plan("gemma-3-1b", device="cpu", memory_bytes=10**9).max_seq_len == 128


def test_longest_sequence_that_a_smaller_memory_holds(directory):
    """31B: 62.5 GB of weights leave 3.2 GB of 73 GB x 0.9; a sequence takes 81,920 bytes a token beyond the window and
    the largest picture, which is computed in one step."""
    got = plan(directory(RELEASED["gemma-4-31b"].config), device="cuda", memory_bytes=73e9)
    left = got.memory_bytes - got.weights_bytes - got.workspace_bytes - got.vision_bytes - got.encoder_cache_bytes
    sliding_pages = (1024 + 1 + 1120 + 16 - 2) // 16 + 1        # what so many positions touch at worst
    assert got.max_seq_len == (left - sliding_pages * 16 * 50 * 16_384) // (16 * 81_920) * 16
    assert 0 <= got.free_bytes < 16 * 81_920


def test_longest_sequence_of_scout_on_two_gpus(directory):
    """Beside its weights 37 GB are left: 0.75 million tokens at 49,152 bytes a token beyond the chunk."""
    got = plan(directory(RELEASED["llama-4-scout"].config), device="cuda", memory_bytes=282e9)
    left = got.memory_bytes - got.weights_bytes - got.workspace_bytes
    chunk_pages = 8192 // 16 + 1                                # a chunk, and the first position of the next
    assert got.max_seq_len == (left - chunk_pages * 16 * 36 * 4096) // (16 * 49_152) * 16
    assert 700_000 < got.max_seq_len < 800_000
    with pytest.raises(MemoryPlanError, match="126900000000 bytes cannot hold 215539722240 of weights"):
        plan(directory(RELEASED["llama-4-scout"].config), device="cuda", memory_bytes=141e9)


@pytest.mark.parametrize(("name", "table_bytes"), [("gemma-4-e2b", 2 * 262144 * 8960),
                                                   ("gemma-4-e4b", 2 * 262144 * 10752)])
def test_a_table_of_per_layer_inputs_left_in_host_memory(directory, name, table_bytes):
    """4.7 and 5.6 GB less on the GPU; rows of a step's tokens travel through its input buffer instead."""
    path = directory(RELEASED[name].config)
    device, host = (plan(path, device="cuda", memory_bytes=24e9, ple=ple) for ple in ("device", "host"))
    assert device.weights_bytes - host.weights_bytes == table_bytes
    assert 0 < host.workspace_bytes - device.workspace_bytes <= 2048 * table_bytes // 262144
    assert host.max_seq_len >= device.max_seq_len and host.n_full_seqs > device.n_full_seqs


def test_ple_is_ignored_without_per_layer_inputs(directory):
    path = directory(tiny.flat("gemma4"))
    assert plan(path, device="cpu", memory_bytes=10**9, ple="host") == plan(path, device="cpu", memory_bytes=10**9)
    with pytest.raises(ConfigError, match="ple is 'gpu', expected one of 'device', 'host'"):
        plan(path, device="cpu", ple="gpu")


def test_needs_no_weights_on_any_lane(directory):
    path = directory(tiny.nested("gemma4"))
    itemsize = {"cpu": 4, "cuda": 2, "emulated": 2}
    plans = {device: plan(path, device=device, memory_bytes=10**9) for device in itemsize}
    n_weights = sum(tensor.size for tensor in tiny.random_tensors(tiny.nested("gemma4")).values())
    for device, got in plans.items():
        assert got.weights_bytes == itemsize[device] * n_weights
        assert got.max_seq_len == 128 and got.n_full_seqs == 64
    with pytest.raises(ConfigError, match="needs memory_bytes"):
        plan(path, device="cuda")


def test_a_head_of_its_own_takes_memory(directory):
    tied, untied = (plan(directory(tiny.flat("gemma3", tie_word_embeddings=tied)), device="cpu", memory_bytes=10**9)
                    for tied in (True, False))
    assert untied.weights_bytes - tied.weights_bytes == 4 * 64 * 32


def test_the_engine_runs_under_its_plan(tmp_path):
    path = tiny.write_checkpoint(tmp_path / "c", tiny.flat("gemma4"))
    arguments = {"device": "cpu", "kv_cache_bytes": 100_000, "max_seqs": 3, "max_batch_tokens": 7, "page_size": 5}
    llm = LLM(path, **arguments)
    assert llm.plan().pools == plan(path, **arguments).pools
    held = sum(array.nbytes for array in (*llm.kv_cache.k, *llm.kv_cache.v))
    assert held == llm.plan().kv_bytes <= 100_000
    assert llm.max_seq_len == llm.plan().max_seq_len


# --- any model, any budget

@st.composite
def models(draw):
    kinds = draw(st.lists(st.builds(
        lambda reach, n_kv_heads, half: AttentionSpec(4, n_kv_heads, 2 * half, 1.0, RopeSpec(1e4), **reach),
        reach=st.sampled_from([{}]) | st.builds(lambda kind, n: {kind: n}, st.sampled_from(["window", "chunk"]),
                                                st.integers(1, 70)),
        n_kv_heads=st.sampled_from([1, 2, 4]), half=st.integers(1, 16)), min_size=1, max_size=3))
    layers = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6))
    return ModelSpec("any", 16, 32, tuple(LayerSpec(kind, DenseSpec(16)) for kind in layers), 1e-6, 0.0, 4.0, None,
                     max_positions=draw(st.integers(1, 300)), tied=True)


@given(spec=models(), kv_bytes=st.integers(1, 400_000), page_size=st.sampled_from([1, 3, 16, 33]),
       max_seqs=st.sampled_from([1, 2, 8]), max_batch_tokens=st.integers(1, 64))
@settings(max_examples=200, deadline=None)
def test_pools_of_any_size(spec, kv_bytes, page_size, max_seqs, max_batch_tokens):
    config = EngineConfig(kv_cache_bytes=kv_bytes, page_size=page_size, max_seqs=max_seqs,
                          max_batch_tokens=max_batch_tokens)

    def needs(pools, n_tokens):
        return sum(pool.page_bytes * pool.spec.pages_needed(n_tokens, page_size) for pool in pools)

    try:
        got = plan_memory(spec, config, "cpu", memory_bytes=10**9)
    except MemoryPlanError:
        small = EngineConfig(page_size=page_size, max_seq_len=1)
        one_page_each = plan_memory(spec, small, "cpu", memory_bytes=10**9)
        assert needs(one_page_each.pools, 1) > kv_bytes
        return
    n = got.max_seq_len
    assert got.kv_bytes <= kv_bytes
    assert 1 <= got.n_full_seqs <= max_seqs
    assert sorted(layer for pool in got.pools for layer in pool.spec.layers) == list(range(len(spec.layers)))
    assert n == spec.max_positions or needs(got.pools, n + 1) > kv_bytes      # nothing longer fits
    for pool in got.pools:
        assert pool.spec.pages_needed(n, page_size) <= pool.n_pages <= max_seqs * -(-n // page_size)
    _assert_one_sequence_fits(got, n, page_size)


def _assert_one_sequence_fits(got, n_tokens, page_size, sizes=None):
    """A sequence of n_tokens, computed in chunks of `sizes`, or one at a time, never lacks a page."""
    cache = KVCache([pool.spec for pool in got.pools], [pool.n_pages for pool in got.pools], page_size,
                    HostLane("cpu", None, np.float32))

    class Task:
        first_logit = 0

    sequence = Sequence(0, [0] * n_tokens, Task, cache.new_page_lists())
    for n in sizes or [1] * n_tokens:
        assert cache.reserve(sequence, n) == n, f"no page for positions from {sequence.n_cached} on"
        sequence.n_cached += n
        cache.trim(sequence)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plenty_of_memory_holds_max_seqs(directory, family):
    path = directory(tiny.flat(family))
    got = plan(path, device="cpu", memory_bytes=10**10, max_seqs=5)
    assert (got.max_seq_len, got.n_full_seqs, got.max_seqs) == (128, 5, 5)
    assert plan(path, device="cpu", memory_bytes=10**11, max_seqs=5).kv_bytes == got.kv_bytes       # and no more
    assert plan(path, device="cpu", memory_bytes=10**10, max_seqs=5, max_seq_len=50).max_seq_len == 50


# --- pictures

def test_memory_for_pictures(directory):
    """Beside the weights: the encoder's buffers, the cache of soft tokens, and where a picture is never split a step
    that holds the largest one beside decodes of all sequences."""
    arguments = {"device": "cpu", "memory_bytes": 10**9, "max_seqs": 3, "max_batch_tokens": 7}
    seeing = {bidirectional: plan(directory(tiny.seeing("gemma4", use_bidirectional_attention=bidirectional)),
                                  **arguments) for bidirectional in (None, "vision")}
    text = plan(directory(tiny.nested("gemma4")), **arguments)
    assert (text.vision_bytes, text.encoder_cache_bytes, text.max_step_tokens, text.longest_run) == (0, 0, 7, 1)
    causal, blocks = seeing[None], seeing["vision"]
    assert causal.vision_bytes == blocks.vision_bytes > 0
    assert causal.n_soft_rows == blocks.n_soft_rows == 8 * 128          # eight pictures as long as a sequence
    assert causal.encoder_cache_bytes == 8 * 128 * 32 * 4
    assert (causal.max_step_tokens, causal.longest_run) == (7, 1)
    assert (blocks.max_step_tokens, blocks.longest_run) == (3 + 128, 128)
    assert text.workspace_bytes == causal.workspace_bytes < blocks.workspace_bytes      # whose steps are longer
    assert blocks.free_bytes == (blocks.memory_bytes - blocks.weights_bytes - blocks.workspace_bytes
                                 - blocks.vision_bytes - blocks.encoder_cache_bytes - blocks.kv_bytes)
    lines = [line for line in str(blocks).splitlines() if line.startswith(("vision", "encoder"))]
    assert lines[1] == "encoder cache              0.1 MiB  1024 soft tokens of pictures" and len(lines) == 2


def test_the_budget_of_the_encoder_cache(directory):
    path = directory(tiny.seeing("gemma4"))
    rows = [plan(path, device="cpu", memory_bytes=10**9, max_batch_tokens=7, encoder_cache_bytes=n).n_soft_rows
            for n in (0, 128 * 500 + 127)]
    assert rows == [7 + 2 * 127, 500]                           # what a step may need; what the bytes hold
    with pytest.raises(ConfigError, match="encoder_cache_bytes is -1, expected an int >= 0"):
        plan(path, device="cpu", encoder_cache_bytes=-1)
    with pytest.raises(MemoryPlanError, match="; lower kv_cache_bytes, encoder_cache_bytes, max_batch_tokens"):
        plan(path, device="cpu", memory_bytes=10**9, encoder_cache_bytes=10**9)


@given(window=st.integers(1, 70), most=st.integers(1, 60), page_size=st.sampled_from([1, 3, 16, 33]),
       kv_bytes=st.integers(20_000, 400_000), max_batch_tokens=st.integers(1, 64), has_global=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_sequence_with_pictures_finds_its_pages(window, most, page_size, kv_bytes, max_batch_tokens, has_global):
    """Computed one token at a time, and the longest picture at once wherever it stands: no page is missing. Beside the
    other full sequences there is room for one picture's step."""
    rope = RopeSpec(1e4)
    layers = tuple(LayerSpec(AttentionSpec(4, 1, 8, 1.0, rope, window=reach, sees_blocks=reach is not None),
                             DenseSpec(16)) for reach in (window, None)[:1 + has_global])
    tower = SiglipSpec(8, 8, 1, 2, patch=1, side=most, n_soft=most**2)
    spec = ModelSpec("any", 16, 32, layers, 1e-6, 0.0, 4.0, None, 300, True, media=MediaSpec(tower, 1, None, 2, 3))
    try:
        got = plan_memory(spec, EngineConfig(kv_cache_bytes=kv_bytes, page_size=page_size, max_seqs=2,
                                             max_batch_tokens=max_batch_tokens), "cpu", memory_bytes=10**12)
    except MemoryPlanError:
        return
    n, run = got.max_seq_len, min(most**2, got.max_seq_len)
    assert got.kv_bytes <= kv_bytes and got.n_full_seqs >= 1
    for pool in got.pools:
        alone, at_once = (pool.spec.pages_needed(n, page_size, length) for length in (1, run))
        assert (got.n_full_seqs - 1) * alone + at_once <= pool.n_pages
    for begin in {0, (n - run) // 3, n - run}:
        sizes = [1] * begin + [run] + [1] * (n - run - begin)
        _assert_one_sequence_fits(got, n, page_size, sizes)


# --- what does not fit

@pytest.mark.parametrize(("arguments", "error", "expected"), [
    ({"memory_bytes": 1000}, MemoryPlanError, "900 bytes cannot hold"),
    ({"memory_bytes": 10**8, "kv_cache_bytes": 10**8}, MemoryPlanError, "with kv_cache_bytes of 100000000"),
    ({"memory_bytes": 10**8, "kv_cache_bytes": 1}, MemoryPlanError, "of 1 bytes holds one sequence of 0 tokens"),
    ({"memory_bytes": 10**8, "kv_cache_bytes": 50_000, "max_seq_len": 128}, MemoryPlanError, "len is 128; raise"),
    ({"memory_bytes": 10**8, "max_seq_len": 129}, ConfigError, "is 129, the model's max_position_embeddings is 128"),
])
def test_refusals(directory, arguments, error, expected):
    with pytest.raises(error) as caught:
        plan(directory(tiny.flat("gemma3")), device="cpu", **arguments)
    assert expected in str(caught.value) and "-" not in str(caught.value)       # no negative sizes


# --- the host

def test_the_host_lends_a_quarter(monkeypatch):
    spec = describe(Config(tiny.flat("gemma3", max_position_embeddings=10**6)))
    monkeypatch.setattr(memory_plan, "host_memory_left", lambda: 40_000_000)
    got = plan_memory(spec, EngineConfig(), "cpu")
    quarter = (40_000_000 - got.weights_bytes - got.workspace_bytes) // 4
    assert got.memory_bytes == 40_000_000
    assert quarter - sum(pool.page_bytes for pool in got.pools) < got.kv_bytes <= quarter
    told = EngineConfig(kv_cache_bytes=3 * quarter)
    assert plan_memory(spec, told, "cpu").kv_bytes > 2 * quarter
    monkeypatch.setattr(memory_plan, "host_memory_left", lambda: 1000)
    with pytest.raises(MemoryPlanError, match="1000 bytes cannot hold"):
        plan_memory(spec, EngineConfig(), "cpu")


MEMINFO = "MemTotal:       16000 kB\nMemFree:         100 kB\nMemAvailable:    8000 kB\nHugePages_Total:       0\n"
V1, V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"


@pytest.mark.parametrize(("files", "left"), [
    ({}, 8_192_000),
    ({f"{V2}/memory.max": "max\n", f"{V2}/memory.current": "5000000\n"}, 8_192_000),
    ({f"{V2}/memory.max": "6000000\n", f"{V2}/memory.current": "5000000\n",
      f"{V2}/memory.stat": "anon 4000000\nfile 900000\ninactive_file 700000\nactive_file 200000\n"}, 1_700_000),
    ({f"{V2}/memory.max": "90000000\n", f"{V2}/memory.current": "5000000\n", f"{V2}/memory.stat": ""}, 8_192_000),
    # a group below the root, whose parent leaves less
    ({"/proc/self/cgroup": "0::/user.slice/app.scope\n", f"{V2}/user.slice/app.scope/memory.max": "7000000",
      f"{V2}/user.slice/app.scope/memory.current": "1000000", f"{V2}/user.slice/memory.max": "9000000",
      f"{V2}/user.slice/memory.current": "6000000"}, 3_000_000),
    # version 1: no limit is a number close to 2^63, and other controllers' groups are not looked at
    ({"/proc/self/cgroup": "5:cpu,cpuacct:/b\n4:memory:/a\n1:name=systemd:/c\n0::/\n",
      f"{V1}/b/memory.limit_in_bytes": "1", f"{V1}/b/memory.usage_in_bytes": "1",
      f"{V1}/memory.limit_in_bytes": "9223372036854771712", f"{V1}/memory.usage_in_bytes": "4000000",
      f"{V1}/a/memory.limit_in_bytes": "5000000", f"{V1}/a/memory.usage_in_bytes": "4500000",
      f"{V1}/a/memory.stat": "inactive_file 1\ntotal_inactive_file 250000\n"}, 750_000),
])
def test_memory_left_on_the_host(monkeypatch, files, left):
    files = {"/proc/meminfo": MEMINFO, **files}
    monkeypatch.setattr(memory_plan, "_read", lambda path: files.get(str(path).replace("//", "/"), ""))
    assert host_memory_left() == left


def test_memory_left_on_this_machine():
    assert 0 < host_memory_left() < 2**50
    assert memory_plan._read("/no/such/file") == ""


# --- as text

def test_text():
    spec = describe(Config(tiny.flat("gemma4")))
    config = EngineConfig(kv_cache_bytes=3 * MiB, max_seqs=2, max_batch_tokens=512)
    got = plan_memory(spec, config, "cpu", memory_bytes=100 * MiB)
    assert str(got).splitlines() == [
        "weights                    0.3 MiB",
        "KV sliding(5)              0.2 MiB  16 pages of 16: 256 tokens, 1024 bytes a token in 4 layers "
        "(2 KV heads of 16)",
        "KV global                  0.1 MiB  16 pages of 16: 256 tokens, 512 bytes a token in 2 layers "
        "(1 KV heads of 32)",
        "workspace                  1.6 MiB",
        "free                      87.8 MiB",
        "longest sequence 128 tokens; 2 of that length at once",
        "a step of 1 token reads at most 0.3 MiB of weights, K and V; a step of all 2 sequences 0.4 MiB"]


@pytest.mark.parametrize("name", RELEASED)
def test_the_bytes_of_a_step_are_those_that_are_planned(directory, name):
    """All weights but the norms, which are far below a thousandth of a large model, tables of which a row is read, and
    experts that the token does not take; K and V of what a window or chunk leaves, once for each layer that reads them.
    """
    got = plan(directory(RELEASED[name].config), device="cuda", memory_bytes=N_GPUS.get(name, 1) * 141e9,
               max_seq_len=20_000)
    spec = preset(name)
    seq_bytes = 0
    for pool in (pool.spec for pool in got.pools):
        n_keys = 20_000 % pool.chunk if pool.chunk else min(pool.window or 20_000, 20_000)
        seq_bytes += n_keys * (len(pool.layers) + len(pool.shared)) * pool.token_bytes(2) // len(pool.layers)
    n_unread = spec.per_layer_vocab * spec.per_layer_width + (0 if spec.tied else spec.vocab * spec.hidden)
    n_unread += N_VISION.get(name, 0) + sum(3 * spec.hidden * moe.intermediate * (moe.n_experts - moe.experts_per_token)
                    for moe in (layer.moe for layer in spec.layers) if moe)
    assert got.step_bytes == pytest.approx(got.weights_bytes - 2 * n_unread + seq_bytes, rel=1e-3)
    if not any(layer.moe for layer in spec.layers):                             # more sequences touch more experts
        assert got.full_step_bytes - got.step_bytes == pytest.approx(
            (got.n_full_seqs - 1) * (seq_bytes + 2 * spec.per_layer_width), rel=1e-4)
