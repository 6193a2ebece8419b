"""Attention of patches to all patches of their own picture: many pictures as one ragged batch, pages of 16, no mask."""

import numpy as np
import pytest

from engine import reference
from engine.batch import PagedBatch
from engine.kernels import ops
from engine.kernels import paged as planning
from engine.kernels.attention import variants
from engine.kernels.paged import geometry, plan, scratch_size, work_capacity
from engine.models.presets import PRESETS, preset
from engine.models.vision_spec import BlockEmbedderSpec
from tests.kernels.closeness import assert_as_good, f64
from tests.kernels.test_attention import Case, attend, dense, rows_of, same_bits

HEADS = [(16, 2), (24, 1), (72, 2)]         # (head_dim, heads): as many KV heads as query heads
TOWERS = {name: media.tower for name in PRESETS if (media := preset(name).media) is not None}
ATTENDING = [name for name, tower in TOWERS.items() if not isinstance(tower, BlockEmbedderSpec)]


@pytest.fixture
def lane(lane, monkeypatch):
    """A small machine, whose blocks have several items each."""
    monkeypatch.setattr(planning, "N_BLOCKS", 24)
    return lane


def last_visible(sizes):
    return np.repeat(np.array(sizes) - 1, sizes).astype(np.int32)


def pictures(sizes, head_dim, n_heads):
    """A Case of pictures of so many patches."""
    return Case.make([(n, n) for n in sizes], head_dim, n_kv_heads=n_heads, last_visible=last_visible(sizes))


def twin(case):
    """reference.attention of what the kernel got, nobody's memory and all, in float64."""
    batch = PagedBatch(case.lists, None, case.rows, case.k.shape[1], case.see["last_visible"])
    out = np.empty(case.q.shape)
    reference.attention(f64(case.q), f64(case.k), f64(case.v), batch, scale=case.scale, out=out)
    return out


@pytest.mark.parametrize("head_dim, n_heads", HEADS)
@pytest.mark.parametrize("sizes", [[40], [9, 200, 16, 63], [130, 128, 17]], ids=str)
def test_pictures_are_as_good_as_plain_math(lane, head_dim, n_heads, sizes):
    """Sizes around a tile's rows, a page and the 16 rows that the smallest tile has; what no picture owns is NaN."""
    case = pictures(sizes, head_dim, n_heads)
    answers = attend(lane, case), twin(case), dense(case, np.float32)
    assert_as_good(*(x.reshape(-1, head_dim) for x in answers))


def test_a_picture_in_parts(lane):
    """One that leaves blocks idle: of 600 patches, whose sums of 256 keys are merged."""
    case = pictures([600], 16, 1)
    assert (plan(case.rows, **case.dims, last_visible=case.see["last_visible"]).prefill[:, 5] == 3).all()
    assert_as_good(attend(lane, case), twin(case), dense(case, np.float32))


@pytest.mark.parametrize("head_dim", [24, 72])
def test_the_twin_is_dense_attention(head_dim):
    """Each patch to every patch of its picture, in float64: softmax(scale * q K) V."""
    case = pictures([9, 70, 144], head_dim, 2)
    np.testing.assert_allclose(twin(case), dense(case, np.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head_dim, n_heads", HEADS)
def test_a_picture_has_the_same_bits_alone_and_among_others(lane, head_dim, n_heads):
    case = pictures([63, 9, 144, 200, 16], head_dim, n_heads)
    whole = attend(lane, case)
    for i, (begin, end, _) in enumerate(case.rows):
        assert same_bits(attend(lane, case.only(i, 0, end - begin)), whole[begin:end])


def test_another_picture_changes_nothing(lane):
    """Two pictures of which the second one's patches are others: the first one's bits stay."""
    case = pictures([100, 60], 72, 2)
    before = attend(lane, case)[:100]
    case.q[100:] = -case.q[100:]
    assert same_bits(attend(lane, case)[:100], before)


# --- the plan of it

def planned(sizes, tower):
    return plan(rows_of([(n, n) for n in sizes]), n_heads=tower.n_heads, n_kv_heads=tower.n_heads,
                head_dim=tower.head_dim, last_visible=last_visible(sizes))


@pytest.mark.parametrize("name", ATTENDING)
@pytest.mark.parametrize("sizes, n_decode, n_prefill", [
    ([10080], 0, 79), ([2520] * 4, 0, 80), ([630] * 16, 0, 80), ([4096], 0, 32), ([9] * 1120, 1120, 0),
    ([9, 10071], 1, 79)], ids=str)
def test_a_tile_of_rows_is_one_item_however_long_its_picture(name, sizes, n_decode, n_prefill):
    """The list grows with the patches, not with their square, and each item walks the keys of its picture alone."""
    tower = TOWERS[name]
    work = planned(sizes, tower)
    assert (len(work.decode), len(work.prefill)) == (n_decode, n_prefill)
    for items in work:
        of_picture = np.array(sizes)[items[:, 0]]
        assert (items[:, 2] == 0).all() and (items[:, 3] == -(-of_picture // geometry(tower.head_dim, True).keys)).all()
        assert len(items) <= work_capacity(sum(-(-n // 16) for n in sizes), max(sizes), tower.n_heads, tower.head_dim)


def test_a_picture_that_leaves_the_machine_idle_is_split():
    """2520 patches of E2B's 12 heads: 20 tiles of rows for 264 blocks, so each in 3 parts of up to 1024 keys."""
    work = planned([2520], TOWERS["gemma-4-e2b"]).prefill
    assert len(work) == 60 and (work[:, 5] == 3).all()
    assert sorted(set(zip(*work[:, 2:4].T.tolist(), strict=True))) == [(0, 16), (16, 32), (32, 40)]


def test_scratch_does_not_know_how_large_pictures_are():
    """What attention wants, at most 76 MiB; products of so many rows want less."""
    for name in ATTENDING:
        tower = TOWERS[name]
        want = scratch_size(tower.n_heads, tower.head_dim)
        assert [ops.vision_scratch_size(tower, 5376, n) for n in (10080, 100800)] == [want, want]
        assert 4 * want[0] < 76 << 20


def test_kernels_of_a_tower_are_compiled_with_its_model():
    for name in ATTENDING:
        spec, tower = preset(name), TOWERS[name]
        widths = {build.constants["HEAD_DIM"] for build, _, _ in variants(spec, 8192)}
        assert widths == {geometry(a, True).head_dim for a in
                          (tower.head_dim, *(layer.attention.head_dim for layer in spec.layers))}
