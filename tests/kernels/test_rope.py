"""rope_angles, attention_temperature and qk_norm_rope_cache against their twins in float64."""

import numpy as np
import pytest

from engine import cost, reference
from engine.errors import ShapeError
from engine.kernels.rope import attention_temperature, geometry, qk_norm_rope_cache, rope_angles
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


@pytest.mark.parametrize("n_pairs", [6, 32, 36, 300])
def test_angles_of_two_columns(lane, n_pairs):
    """The first half of the pairs turns by a patch's column, the second by its row."""
    x, y = np.divmod(np.arange(40), 7)
    inv_freq = np.tile(100.0 ** (-2 * np.arange(n_pairs // 2) / n_pairs), 2).astype(np.float32)
    got = run_angles(lane, np.stack([x, 1000 + y], axis=1), inv_freq)
    for pairs, column in ((slice(n_pairs // 2), x), (slice(n_pairs // 2, None), 1000 + y)):
        np.testing.assert_array_equal(got[..., pairs], run_angles(lane, column, inv_freq)[..., pairs])
    assert np.abs(got - twin_angles(np.stack([x, 1000 + y], axis=1), inv_freq)).max() <= ANGLE_ERROR


def test_no_angles(lane):
    assert run_angles(lane, np.zeros(0), np.ones(8, np.float32)).shape == (0, 2, 8)
    assert run_angles(lane, np.zeros((0, 2)), np.ones(8, np.float32)).shape == (0, 2, 8)
    assert run_angles(lane, np.arange(3), np.ones(0, np.float32)).shape == (3, 2, 0)


def test_angles_refuse_what_does_not_fit(lane):
    with pytest.raises(ShapeError, match=r"out is \[2, 2, 9\] float32, expected \[n_tokens=2, 2, n_pairs=8\]"):
        rope_angles(lane.zeros((2,), np.int32), lane.zeros((8,), np.float32), lane.zeros((2, 2, 9), np.float32))
    with pytest.raises(ShapeError, match=r"positions is \[2, 3\] int32, expected \[n_tokens, 2\]"):
        rope_angles(lane.zeros((2, 3), np.int32), lane.zeros((8,), np.float32), lane.zeros((2, 2, 8), np.float32))
    with pytest.raises(ShapeError, match="9 pairs turn by two columns of positions, expected an even number"):
        rope_angles(lane.zeros((2, 2), np.int32), lane.zeros((9,), np.float32), lane.zeros((2, 2, 9), np.float32))


@pytest.mark.parametrize("n_axes", [1, 2])
def test_angles_move_the_least(lane, n_axes):
    positions, inv_freq = np.arange(48 * n_axes).reshape((48, 2)[:n_axes]), RopeSpec(1e6).inv_freq(512)
    out = run_angles(lane, positions, inv_freq)
    assert_least_traffic(lane.traffic(),
                         least_bytes("rope.cu", "rope_angles", n_tokens=48, n_pairs=256, n_axes=n_axes),
                         cost.rope_angles(positions, inv_freq, out))


# --- temperature

def run_temperature(lane, positions, scale, floor):
    out = lane.empty((len(positions),), np.float32)
    attention_temperature(lane.put(np.array(positions, np.int32)), scale, floor, out)
    return lane.to_host(out)


@pytest.mark.parametrize("scale, floor", [(0.1, 8192), (0.1, 1), (2.5, 5)])
def test_temperature_at_short_and_long_positions(lane, scale, floor):
    """Within 1e-7 of the formula, scale rounded to float32; on both sides of each step."""
    positions = np.array([0, 1, 8189, 8190, 8191, 8192, 16382, 16383, 131071, 1048575, 10485759, 2**31 - 2])
    got, want = run_temperature(lane, positions, scale, floor), np.empty(len(positions))
    reference.attention_temperature(positions, float(np.float32(scale)), floor, want)
    assert (np.abs(got - want) <= 1e-7 * want).all()


def test_temperature_of_llama4(lane):
    """1 up to position 8190; the figures of the released models' 0.1 and 8192."""
    figures = {8190: 1.0, 8191: 1.0693, 16383: 1.1099, 131071: 1.2833, 1048575: 1.4860, 10485759: 1.7155}
    np.testing.assert_allclose(run_temperature(lane, list(figures), 0.1, 8192), list(figures.values()), atol=5e-5)
    assert (run_temperature(lane, range(8191), 0.1, 8192) == 1).all()


def test_temperature_refuses_what_does_not_fit(lane):
    assert run_temperature(lane, [], 0.1, 8192).shape == (0,)
    with pytest.raises(ShapeError, match=r"out is \[3\] float32, expected \[n_tokens=2\] float32"):
        attention_temperature(lane.zeros((2,), np.int32), 0.1, 8192, lane.zeros((3,), np.float32))
    with pytest.raises(ShapeError, match="floor is 0, expected an int above 0"):
        run_temperature(lane, [1], 0.1, 0)


def test_temperatures_move_the_least(lane):
    positions = np.arange(1000, dtype=np.int32)
    out = run_temperature(lane, positions, 0.1, 100)
    assert_least_traffic(lane.traffic(), least_bytes("rope.cu", "attention_temperature", n_tokens=1000),
                         cost.attention_temperature(positions, 0.1, 100, out))


# --- norm, rotation, cache

class Case:
    """Seeded inputs of one call, on the host; pages larger than the tokens need, full of NaN. rope None: no rotation;
    n_kv_heads 0: q alone, no slots and no pages."""

    def __init__(self, n_tokens, n_heads, n_kv_heads, head_dim, rope="full", v_norm=False, v_is_k=False, offset=0.0,
                 page_size=3, has_norms=True, hidden_slots=(1,), qk_norm="weighted", has_temperature=False):
        rng = np.random.default_rng([n_tokens, n_heads, head_dim])
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.rope, self.v_norm, self.v_is_k, self.offset = ROPES[rope or "none"], v_norm, v_is_k, offset
        self.qk_norm = qk_norm
        self.n_in = n_heads + n_kv_heads * (1 if v_is_k else 2)
        self.qkv = normals(rng, n_tokens, self.n_in * head_dim)
        self.q_norm, self.k_norm = normals(rng, 2, head_dim) if has_norms else (None, None)
        self.angles = np.empty((n_tokens, 2, self.rope.n_pairs(head_dim)), np.float32)
        positions = rng.integers(0, 5000, n_tokens).astype(np.int32)
        reference.rope_angles(positions, self.rope.inv_freq(head_dim), self.angles)
        self.pages = -(-n_tokens // page_size) + 1, page_size, n_kv_heads, head_dim
        self.slots = rng.permutation(self.pages[0] * page_size)[:n_tokens].astype(np.int32)
        self.slots[[i for i in hidden_slots if i < n_tokens]] = -1
        self.temperature = rng.uniform(1, 2, n_tokens).astype(np.float32) if has_temperature else None
        self.angles = self.angles if rope else None
        self.slots = self.slots if n_kv_heads else None

    def options(self, rows=slice(None), temperature=None):
        return {"n_heads": self.n_heads, "v_norm": self.v_norm, "v_is_k": self.v_is_k, "eps": EPS,
                "weight_offset": self.offset, "interleaved": self.rope.interleaved, "qk_norm": self.qk_norm,
                "temperature": temperature}

    def arrays(self, rows=slice(None)):
        return self.qkv[rows], self.q_norm, self.k_norm, *(None if x is None else x[rows]
                                                           for x in (self.angles, self.slots))

    def run(self, lane, rows=slice(None)):
        """(q, k pages, v pages), bfloat16."""
        arrays = [None if x is None else lane.put(x) for x in self.arrays(rows)]
        pages = [lane.put(np.full(self.pages, np.nan, BF16)) if self.n_kv_heads else None for _ in range(2)]
        out = lane.empty((len(self.qkv[rows]), self.n_heads * self.head_dim), BF16)
        temperature = None if self.temperature is None else lane.put(self.temperature[rows])
        qk_norm_rope_cache(*arrays, *pages, **self.options(temperature=temperature), out=out)
        return [None if x is None else lane.to_host(x) for x in (out, *pages)]

    def twin(self, angles=None):
        """The same in float64; `angles` in place of its own."""
        qkv, *rest = (None if x is None else f64(x) for x in self.arrays()[:4])
        options = self.options(temperature=self.temperature)
        if angles is not None:
            rest[-1] = angles
            if self.qk_norm == "plain":                     # before the rotation: a term of it has no norm of its own
                rest, options = [None, None, angles], {**options, "qk_norm": "weighted"}
        k_pages, v_pages = (np.full(self.pages, np.nan) if self.n_kv_heads else None for _ in range(2))
        out = np.empty((len(qkv), self.n_heads * self.head_dim))
        reference.qk_norm_rope_cache(qkv, *rest, self.slots, k_pages, v_pages, **options, out=out)
        return out, k_pages, v_pages

    def terms(self):
        """The two products that a rotated value is the sum of: x cos, and the rest."""
        if self.angles is None:
            return self.twin()[:2], self.twin()[:2]
        cosines, sines = f64(self.angles), f64(self.angles)
        cosines[:, 1], sines[:, 0] = 0, 0
        return self.twin(cosines)[:2], self.twin(sines)[:2]

    def check(self, lane):
        out, k_pages, v_pages = self.run(lane)
        want_out, want_k, want_v = self.twin()
        (q_cos, k_cos), (q_sin, k_sin) = self.terms()
        assert_ulps(out, want_out, terms=(q_cos, q_sin))
        if not self.n_kv_heads:
            return
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


# Llama 4 Scout: rotated layers, layers without positions; Maverick's rotated ones; others that nobody has
FORMS = [{"qk_norm": "plain", "rope": "interleaved"}, {"qk_norm": None, "rope": None, "has_temperature": True},
         {"qk_norm": None, "rope": "interleaved"}, {"qk_norm": None, "rope": None},
         {"qk_norm": "plain", "rope": None, "v_norm": True}, {"qk_norm": "weighted", "rope": None, "v_is_k": True},
         {"qk_norm": "weighted", "rope": "quarter", "has_temperature": True, "offset": 1.0},
         {"qk_norm": None, "rope": "full", "has_temperature": True, "v_norm": True, "v_is_k": True}]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("head_dim", [20, 128, 512])
def test_heads_normed_and_rotated_or_not(lane, head_dim, form):
    """Norm weights are there throughout: "plain" and None do not read them."""
    Case(5, 5, 2, head_dim, **form).check(lane)


@pytest.mark.parametrize("form", [{}, {"rope": "quarter", "v_norm": True, "offset": 1.0}, FORMS[0], FORMS[1]], ids=str)
@pytest.mark.parametrize("head_dim", [20, 256, 512])
def test_q_alone(lane, head_dim, form):
    """Of a layer that reads another's K and V; bits as those of q beside k and v."""
    case = Case(5, 6, 0, head_dim, **form)
    case.check(lane)
    beside = Case(5, 6, 1, head_dim, **form)
    beside.qkv[:, :6 * head_dim] = case.qkv
    beside.angles, beside.temperature = case.angles, case.temperature
    beside.q_norm = case.q_norm
    np.testing.assert_array_equal(case.run(lane)[0].view(np.uint16), beside.run(lane)[0].view(np.uint16))


def test_heads_neither_normed_nor_rotated_are_copied(lane):
    """Zeros keep their sign, NaN stays in its place."""
    case = Case(4, 2, 1, 16, None, qk_norm=None, hidden_slots=())
    case.qkv[1, 3], case.qkv[2, ::2], case.qkv[0, 33] = np.nan, -0.0, np.nan
    q, k_pages, v_pages = case.run(lane)
    np.testing.assert_array_equal(f64(q), f64(case.qkv[:, :32]))
    np.testing.assert_array_equal(np.signbit(f64(q[2])), np.signbit(f64(case.qkv[2, :32])))
    for i, pages in enumerate((k_pages, v_pages)):
        np.testing.assert_array_equal(f64(pages.reshape(-1, 16)[case.slots]), f64(case.qkv[:, 32 + 16 * i:48 + 16 * i]))


def test_a_token_has_the_same_bits_in_any_batch_without_positions(lane):
    case = Case(9, 6, 2, 128, None, qk_norm=None, has_temperature=True, hidden_slots=())
    together = case.run(lane)[0].view(np.uint16)
    for i in range(9):
        np.testing.assert_array_equal(case.run(lane, slice(i, i + 1))[0][0].view(np.uint16), together[i])


@pytest.mark.parametrize("changed, message", [
    ({"k_pages": None}, "slots, k_pages and v_pages come together, or none of them where qkv is q alone"),
    ({"slots": None}, "slots, k_pages and v_pages come together"),
    ({"slots": None, "k_pages": None, "v_pages": None}, r"qkv is \[3, 64\] bfloat16, expected .*qkv_width=32\]"),
    ({"temperature": np.ones(4, np.float32)}, r"temperature is \[4\] float32, expected \[n_tokens=3\]"),
    ({"temperature": np.ones(3, BF16)}, r"temperature is \[3\] bfloat16"),
    ({"qk_norm": "l2"}, "qk_norm is 'l2', expected one of 'weighted', 'plain', None"),
])
def test_forms_that_do_not_fit_are_refused(lane, changed, message):
    case = Case(3, 2, 1, 16)
    arrays = dict(zip(("qkv", "q_norm", "k_norm", "angles", "slots"), case.arrays(), strict=True))
    arrays |= {name: np.zeros(case.pages, BF16) for name in ("k_pages", "v_pages")}
    arrays["out"] = np.zeros((3, 32), BF16)
    given = {**case.options(), **arrays, **changed}
    with pytest.raises(ShapeError, match=message):
        qk_norm_rope_cache(**{n: lane.put(x) if isinstance(x, np.ndarray) else x for n, x in given.items()})


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
                        n_kv_heads=n_kv_heads, head_dim=head_dim, n_pairs=case.rope.n_pairs(head_dim), n_weights=2,
                        has_slots=True, has_temperature=False)
    assert_least_traffic(lane.traffic(), least,
                         cost.qk_norm_rope_cache(*case.arrays(), *pages, **case.options(), out=q))


# Llama 4 Scout, rotated and not; Gemma 4 E2B, a layer with the K and V of another
@pytest.mark.parametrize("n_heads, n_kv_heads, head_dim, form, n_weights", [
    (40, 8, 128, FORMS[0], 0), (40, 8, 128, FORMS[1], 0), (8, 0, 512, {"rope": "quarter"}, 1)])
def test_other_forms_move_the_least(lane, n_heads, n_kv_heads, head_dim, form, n_weights):
    case = Case(16, n_heads, n_kv_heads, head_dim, page_size=16, hidden_slots=(), **form)
    q, *pages = case.run(lane)
    n_pairs = 0 if case.angles is None else case.angles.shape[2]
    least = least_bytes("rope.cu", "qk_norm_rope_cache", n_tokens=16, n_in=case.n_in, n_heads=n_heads,
                        n_kv_heads=n_kv_heads, head_dim=head_dim, n_pairs=n_pairs, n_weights=n_weights,
                        has_slots=n_kv_heads > 0, has_temperature=case.temperature is not None)
    got = cost.qk_norm_rope_cache(*case.arrays(), *pages, **case.options(temperature=case.temperature), out=q)
    assert_least_traffic(lane.traffic(), least, got)
