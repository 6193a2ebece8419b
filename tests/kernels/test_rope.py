"""rope_angles and qk_norm_rope_cache against their twins in float64."""

import numpy as np
import pytest

from engine import cost, reference
from engine.errors import ShapeError
from engine.kernels.rope import geometry, qk_norm_rope_cache, rope_angles
from engine.models.spec import Llama3Scaling, RopeSpec
from tests.kernels.closeness import BF16, assert_ulps, bf16, f64
from tests.kernels.declared import assert_least_traffic, least_bytes

EPS = 1e-6
ROPES = {"full": RopeSpec(1e4), "linear": RopeSpec(1e6, factor=8.0), "quarter": RopeSpec(1e6, partial=0.25),
         "none": RopeSpec(1e4, partial=0.0), "interleaved": RopeSpec(5e5, interleaved=True),
         "interleaved, half": RopeSpec(5e5, partial=0.5, interleaved=True),
         "llama3": RopeSpec(5e5, 16.0, interleaved=True, llama3=Llama3Scaling(1.0, 4.0, 8192))}


def normals(rng, *shape):
    return bf16(rng.standard_normal(shape))


# --- angles

def run_angles(lane, positions, inv_freq):
    out = lane.empty((len(positions), 2, len(inv_freq)), np.float32)
    rope_angles(lane.put(positions.astype(np.int32)), lane.put(inv_freq), out)
    return lane.to_host(out)


def twin_angles(positions, inv_freq):
    out = np.empty((len(positions), 2, len(inv_freq)))
    reference.rope_angles(positions.astype(np.int32), inv_freq, out)
    return out


ANGLE_ERROR = 1.5e-7            # cos_sin of rope.cu says where it comes from


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("head_dim", [12, 64, 80, 128, 512])
def test_angles_at_short_and_long_positions(lane, rope, head_dim):
    positions = np.array([0, 1, 2, 1023, 8191, 8192, 131071, 262143, 2**22, 10485759])
    inv_freq = ROPES[rope].inv_freq(head_dim)
    got = run_angles(lane, positions, inv_freq)
    assert got.dtype == np.float32
    assert np.abs(got - twin_angles(positions, inv_freq)).max(initial=0) <= ANGLE_ERROR
    assert (got[0, 0] == 1).all() and (got[0, 1] == 0).all()


def test_angles_of_every_quarter_turn(lane):
    """Around the multiples of pi/4, where the reduction changes its mind, and around large ones of pi/2."""
    turns = np.concatenate([np.arange(1, 400) * (np.pi / 4), (np.arange(1, 200) * 13337) * (np.pi / 2)])
    steps = np.float32(turns)[:, None].view(np.int32) + np.arange(-2, 3, dtype=np.int32)
    inv_freq = steps.reshape(-1).view(np.float32)
    got = run_angles(lane, np.array([1]), inv_freq)
    assert np.abs(got - twin_angles(np.array([1]), inv_freq)).max() <= ANGLE_ERROR


def test_no_angles(lane):
    assert run_angles(lane, np.zeros(0), np.ones(8, np.float32)).shape == (0, 2, 8)
    assert run_angles(lane, np.arange(3), np.ones(0, np.float32)).shape == (3, 2, 0)


def test_angles_refuse_what_does_not_fit(lane):
    with pytest.raises(ShapeError, match=r"out is \[2, 2, 9\] float32, expected \[n_tokens=2, 2, n_pairs=8\]"):
        rope_angles(lane.zeros((2,), np.int32), lane.zeros((8,), np.float32), lane.zeros((2, 2, 9), np.float32))


def test_angles_move_the_least(lane):
    positions, inv_freq = np.arange(48), RopeSpec(1e6).inv_freq(512)
    out = run_angles(lane, positions, inv_freq)
    assert_least_traffic(lane.traffic(), least_bytes("rope.cu", "rope_angles", n_tokens=48, n_pairs=256),
                         cost.rope_angles(positions, inv_freq, out))


# --- norm, rotation, cache

class Case:
    """Seeded inputs of one call, on the host; pages larger than the tokens need, full of NaN."""

    def __init__(self, n_tokens, n_heads, n_kv_heads, head_dim, rope="full", v_norm=False, v_is_k=False, offset=0.0,
                 page_size=3, has_norms=True, hidden_slots=(1,)):
        rng = np.random.default_rng([n_tokens, n_heads, head_dim])
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.rope, self.v_norm, self.v_is_k, self.offset = ROPES[rope], v_norm, v_is_k, offset
        self.n_in = n_heads + n_kv_heads * (1 if v_is_k else 2)
        self.qkv = normals(rng, n_tokens, self.n_in * head_dim)
        self.q_norm, self.k_norm = normals(rng, 2, head_dim) if has_norms else (None, None)
        self.angles = np.empty((n_tokens, 2, self.rope.n_pairs(head_dim)), np.float32)
        positions = rng.integers(0, 5000, n_tokens).astype(np.int32)
        reference.rope_angles(positions, self.rope.inv_freq(head_dim), self.angles)
        self.pages = -(-n_tokens // page_size) + 1, page_size, n_kv_heads, head_dim
        self.slots = rng.permutation(self.pages[0] * page_size)[:n_tokens].astype(np.int32)
        self.slots[[i for i in hidden_slots if i < n_tokens]] = -1

    def options(self):
        return {"n_heads": self.n_heads, "v_norm": self.v_norm, "v_is_k": self.v_is_k, "eps": EPS,
                "weight_offset": self.offset, "interleaved": self.rope.interleaved}

    def arrays(self, rows=slice(None)):
        return self.qkv[rows], self.q_norm, self.k_norm, self.angles[rows], self.slots[rows]

    def run(self, lane, rows=slice(None)):
        """(q, k pages, v pages), bfloat16."""
        arrays = [None if x is None else lane.put(x) for x in self.arrays(rows)]
        pages = [lane.put(np.full(self.pages, np.nan, BF16)) for _ in range(2)]
        out = lane.empty((len(self.slots[rows]), self.n_heads * self.head_dim), BF16)
        qk_norm_rope_cache(*arrays, *pages, **self.options(), out=out)
        return [lane.to_host(x) for x in (out, *pages)]

    def twin(self, angles=None):
        """The same in float64; `angles` in place of its own."""
        qkv, *rest, slots = (None if x is None else f64(x) for x in self.arrays())
        rest[-1] = rest[-1] if angles is None else angles
        k_pages, v_pages = (np.full(self.pages, np.nan) for _ in range(2))
        out = np.empty((len(qkv), self.n_heads * self.head_dim))
        reference.qk_norm_rope_cache(qkv, *rest, slots.astype(np.int32), k_pages, v_pages, **self.options(), out=out)
        return out, k_pages, v_pages

    def terms(self):
        """The two products that a rotated value is the sum of: x cos, and the rest."""
        cosines, sines = f64(self.angles), f64(self.angles)
        cosines[:, 1], sines[:, 0] = 0, 0
        return self.twin(cosines)[:2], self.twin(sines)[:2]

    def check(self, lane):
        out, k_pages, v_pages = self.run(lane)
        want_out, want_k, want_v = self.twin()
        (q_cos, k_cos), (q_sin, k_sin) = self.terms()
        assert_ulps(out, want_out, terms=(q_cos, q_sin))
        written = ~np.isnan(want_k)
        np.testing.assert_array_equal(~np.isnan(f64(k_pages)), written)         # and nothing beside
        np.testing.assert_array_equal(~np.isnan(f64(v_pages)), written)
        assert_ulps(k_pages[written], want_k[written], terms=(k_cos[written], k_sin[written]))
        assert_ulps(v_pages[written], want_v[written])


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("head_dim", [4, 12, 16, 20, 24, 40, 48, 64, 72, 80, 128, 256, 500, 512])
def test_norm_rotation_and_cache(lane, head_dim, rope):
    Case(5, 3, 2, head_dim, rope, offset=1.0).check(lane)


@pytest.mark.parametrize("n_heads, n_kv_heads", [(1, 1), (4, 1), (16, 1), (8, 4), (5, 5), (32, 16)])
@pytest.mark.parametrize("v_norm, v_is_k", [(False, False), (True, False), (False, True), (True, True)])
def test_heads_of_every_kind(lane, n_heads, n_kv_heads, v_norm, v_is_k):
    """v normed or not, projected or k before its norm and rotation; blocks that end among q, k or v heads."""
    Case(4, n_heads, n_kv_heads, 48, "quarter", v_norm, v_is_k).check(lane)


@pytest.mark.parametrize("head_dim", [24, 128, 256])
def test_heads_without_norm_weights(lane, head_dim):
    Case(4, 2, 1, head_dim, "interleaved", has_norms=False, offset=1.0).check(lane)


@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
def test_pages_of_any_size(lane, page_size):
    Case(37, 2, 1, 16, page_size=page_size, hidden_slots=(0, 7, 36)).check(lane)


def test_more_tokens_than_a_grid_shares(lane):
    """From 2112 tokens on one block has all heads of a token."""
    Case(2112, 9, 2, 64, "quarter").check(lane)


def test_k_without_a_slot_is_nowhere(lane):
    """q comes out all the same."""
    case = Case(3, 2, 1, 16, hidden_slots=(0, 1, 2))
    out, k_pages, v_pages = case.run(lane)
    assert np.isnan(f64(k_pages)).all() and np.isnan(f64(v_pages)).all() and np.isfinite(f64(out)).all()


@pytest.mark.parametrize("head_dim", [20, 64, 256, 512])
def test_a_token_has_the_same_bits_in_any_batch(lane, head_dim):
    case = Case(9, 6, 2, head_dim, v_norm=True, hidden_slots=())
    together = case.run(lane)
    for i in range(9):
        out, *pages = case.run(lane, slice(i, i + 1))
        np.testing.assert_array_equal(out[0].view(np.uint16), together[0][i].view(np.uint16))
        for page, all_pages in zip(pages, together[1:], strict=True):
            alone, beside = (x.reshape(-1, 2 * head_dim)[case.slots[i]].view(np.uint16) for x in (page, all_pages))
            np.testing.assert_array_equal(alone, beside)


def test_a_token_has_the_same_bits_however_blocks_share_heads(lane):
    case = Case(2112, 40, 2, 32, hidden_slots=())
    together, alone = case.run(lane)[0], case.run(lane, slice(1000, 1003))[0]
    np.testing.assert_array_equal(together[1000:1003].view(np.uint16), alone.view(np.uint16))


def test_no_tokens(lane):
    assert Case(0, 2, 1, 16).run(lane)[0].shape == (0, 32)


@pytest.mark.parametrize("name, shape, message", [
    ("qkv", (3, 60), r"qkv is \[3, 60\] bfloat16, expected \[n_tokens, qkv_width=64\]"),
    ("q_norm", (12,), r"q_norm is \[12\]"), ("k_norm", (1, 16), r"k_norm is \[1, 16\]"),
    ("slots", (4,), r"slots is \[4\]"), ("angles", (3, 2, 9), "angles are of 9 pairs, head_dim 16 has 8"),
    ("out", (3, 16), r"out is \[3, 16\]"), ("v_pages", (2, 3, 1, 12), r"v_pages is \[2, 3, 1, 12\]"),
])
def test_what_does_not_fit_is_refused(lane, name, shape, message):
    case = Case(3, 2, 1, 16)
    arrays = dict(zip(("qkv", "q_norm", "k_norm", "angles", "slots"), case.arrays(), strict=True))
    arrays |= {name: np.zeros(case.pages, BF16) for name in ("k_pages", "v_pages")}
    arrays["out"] = np.zeros((3, 32), BF16)
    arrays[name] = np.zeros(shape, arrays[name].dtype)
    with pytest.raises(ShapeError, match=message):
        qk_norm_rope_cache(**{n: lane.put(x) for n, x in arrays.items()}, **case.options())


@pytest.mark.parametrize("head_dim", [6, 516])
def test_head_sizes_that_no_kernel_takes_are_refused(lane, head_dim):
    case = Case(1, 1, 1, head_dim)
    with pytest.raises(ShapeError, match=f"head_dim is {head_dim}, expected a multiple of 4 up to 512"):
        case.run(lane)


def test_lanes_cover_every_head():
    for head_dim in range(4, 513, 4):
        width, chunks, n_lanes = geometry(head_dim)
        assert head_dim // 2 % width == 0 and width * chunks * n_lanes >= head_dim // 2
        assert n_lanes in (1, 2, 4, 8, 16, 32)


# Gemma 3 27B and 1B; Gemma 4 31B, sliding and global
@pytest.mark.parametrize("n_heads, n_kv_heads, head_dim, rope, v_is_k", [
    (32, 16, 128, "full", False), (4, 1, 256, "linear", False), (32, 16, 256, "full", False),
    (32, 4, 512, "quarter", True)])
def test_rotation_moves_the_least(lane, n_heads, n_kv_heads, head_dim, rope, v_is_k):
    case = Case(16, n_heads, n_kv_heads, head_dim, rope, v_norm=v_is_k, v_is_k=v_is_k, page_size=16, hidden_slots=())
    q, *pages = case.run(lane)
    least = least_bytes("rope.cu", "qk_norm_rope_cache", n_tokens=16, n_in=case.n_in, n_heads=n_heads,
                        n_kv_heads=n_kv_heads, head_dim=head_dim, n_pairs=case.rope.n_pairs(head_dim))
    assert_least_traffic(lane.traffic(), least,
                         cost.qk_norm_rope_cache(*case.arrays(), *pages, **case.options(), out=q))
