"""What engine/kernels/ops.py says of vision towers: sizes that no kernel takes, scratch, and what is compiled."""

from dataclasses import replace
from importlib import import_module

import pytest

from engine import reference
from engine.errors import ConfigError
from engine.kernels import gemm, ops, paged
from engine.models.presets import PRESETS, preset
from engine.models.vision_spec import BlockEmbedderSpec, Gemma4TowerSpec, SiglipSpec

SPECS = {name: preset(name) for name in PRESETS if preset(name).media}


def with_tower(name, **sizes):
    spec = SPECS[name]
    return replace(spec, media=replace(spec.media, tower=replace(spec.media.tower, **sizes)))


# --- sizes

@pytest.mark.parametrize("name", SPECS)
def test_released_towers_are_taken(name):
    ops.check(SPECS[name])


@pytest.mark.parametrize("name, sizes, message", [
    ("gemma-4-31b", {"hidden": 1154}, "vision_config: hidden_size is 1154: the kernels take multiples of 4"),
    ("gemma-4-31b", {"intermediate": 4302}, "vision_config: intermediate_size is 4302: the kernels take multiples"),
    ("gemma-4-31b", {"head_dim": 70}, "vision_config: head_dim is 70: the kernels take multiples of 4"),
    ("gemma-4-31b", {"head_dim": 516}, "vision_config: head_dim is 516: the attention kernel takes up to 512"),
    ("gemma-4-31b", {"patch": 15}, "vision_config: values of a patch is 675: the kernels take multiples of 4"),
    ("gemma-4-31b", {"hidden": 16388}, "vision_config: rows of 16388 are normed: the norm kernels take up to 16384"),
    ("gemma-3-4b", {"n_heads": 1}, "vision_config: head_dim is 1152: the attention kernel takes up to 512"),
    ("gemma-4-12b", {"block": 80}, "vision_config: rows of 19200 are normed: the norm kernels take up to 16384"),
])
def test_what_no_kernel_takes_is_refused_by_name(name, sizes, message):
    with pytest.raises(ConfigError, match=message + ".*device='cpu' takes any"):
        ops.check(with_tower(name, **sizes))


# --- scratch

@pytest.mark.parametrize("name", SPECS)
def test_scratch_holds_what_each_launch_of_a_tower_wants(name):
    spec = SPECS[name]
    tower, most = spec.media.tower, spec.media.tower.most_patches
    floats, counters = ops.vision_scratch_size(tower, spec.hidden, most)
    for n in (1, 9, 63, 64, 65, 280, 2520, most):
        for shape in gemm.tower_shapes(tower, spec.hidden):
            want = gemm.plan(*shape, min(n, most)).scratch_size
            assert want[0] <= floats and want[1] <= counters
    if not isinstance(tower, BlockEmbedderSpec):
        want = paged.scratch_size(tower.n_heads, tower.head_dim)
        assert want[0] <= floats and want[1] <= counters


def test_scratch_on_the_cpu_is_of_gate_and_up():
    """And of nothing where no product is gated: with bounds gate and up are products of their own."""
    names = ("gemma-4-31b", "gemma-4-e4b", "gemma-3-27b", "gemma-4-12b")
    sizes = [reference.vision_scratch_size(SPECS[name].media.tower, 5376, 2520) for name in names]
    assert SPECS["gemma-4-e4b"].media.tower.clipped
    assert sizes == [(2520 * 2 * 4304, 0), (0, 0), (0, 0), (0, 0)]


def test_with_cublas_gate_and_up_go_through_scratch():
    tower = SPECS["gemma-4-31b"].media.tower
    floats, counters = ops.with_cublas().vision_scratch_size(tower, 5376, 10080)
    ours = ops.vision_scratch_size(tower, 5376, 10080)
    assert floats >= max(ours[0], 2 * 4304) and counters == ours[1]


# --- what is compiled

@pytest.mark.parametrize("name", SPECS)
def test_the_kernels_of_a_tower_are_among_the_variants(name):
    spec = SPECS[name]
    found = {build.entry for module in ("activation", "attention", "embedding", "gemm", "rmsnorm", "rope")
             for build, _, _ in import_module(f"engine.kernels.{module}").variants(spec, 8192)}
    every = {"place_rows", "add_rows", "pool_rows", "clamp", "add_bias", "rms_norm"}
    assert found >= every | {"add_residual" if isinstance(spec.media.tower, Gemma4TowerSpec) else "layer_norm"}


def test_norms_are_compiled_for_rows_of_the_tower():
    """Gemma 4 12B norms patches of 6912 values and states of 3840; towers have rows of 1152 or 768."""
    rmsnorm = import_module("engine.kernels.rmsnorm")
    for name, hidden in (("gemma-4-12b", 6912), ("gemma-4-12b", 3840), ("gemma-3-4b", 1152)):
        width, chunks, n_threads = rmsnorm.geometry(hidden)
        assert (rmsnorm.LAYER_NORM(WIDTH=width, CHUNKS=chunks, ROUND_FIRST=0), n_threads, 0) in list(
            rmsnorm.variants(SPECS[name], 1))


def test_heads_without_a_norm_are_compiled_for_the_tower_that_has_them():
    rope = import_module("engine.kernels.rope")
    for name in ("gemma-3-4b", "gemma-4-31b"):
        is_varied = {build.constants["VARIED"] for build, _, _ in rope.variants(SPECS[name], 1)
                     if build.entry == "qk_norm_rope_cache"}
        assert is_varied == ({0, 1} if isinstance(SPECS[name].media.tower, SiglipSpec) else {0})
