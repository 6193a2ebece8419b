"""engine/vision: towers against transformers, in float32 and bfloat16; one batch as good as many; one copy a run."""

from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from itertools import pairwise
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from engine import reference
from engine.backend import HostLane, open_lane
from engine.cuda_lane import CudaLane
from engine.kernels import ops as kernels
from engine.models import describe
from engine.models.vision_spec import BlockEmbedderSpec, Gemma4TowerSpec, SiglipSpec
from engine.trace import traced
from engine.vision.encoder import KINDS, VisionEncoder
from engine.vision.inputs import VisionInputs, VisionStager, pages
from engine.vision.patches import positions, windows
from engine.vision.runs import PAGE, run_patches
from engine.vision_tensors import vision_targets
from engine.vision_weights import VisionWeights
from engine.workspace import Scratch
from loaders.config import Config
from tests.golden import TOLERANCE, Golden
from tests.pictures import CASES, PICTURES, golden_pictures, opened, random_pictures, some_pictures, spec_of
from tests.test_gemma4_vectors import AGREEMENT, VECTORS, value
from tests.test_weights import loaded

BF16 = np.dtype(ml_dtypes.bfloat16)
ONE_OF_EACH = ("gemma4-vision", "gemma4-vision-bidir", "gemma3-vision", "gemma4-unified")
TOWERS = (Gemma4TowerSpec(64, 80, 2, 4, 16, patch=4), SiglipSpec(72, 112, 2, 3, patch=14, side=112, n_soft=16),
          BlockEmbedderSpec(80, block=12))


def encoder_of(case, device="cpu", **arguments):
    spec, weights, lane = opened(case, device)
    return VisionEncoder(spec, weights.vision, lane, **arguments)


def encode(encoder, pictures, lane, observe=None):
    """Soft tokens of pictures, one behind the other, on the host; whatever was there before does not matter."""
    ends = np.cumsum([0, *(picture.n_tokens for picture in pictures)])
    soft = lane.to_device(np.full((ends[-1], encoder.spec.hidden), np.nan, lane.dtype))
    encoder.encode(pictures, soft, [np.arange(*span, dtype=np.int32) for span in pairwise(ends)], observe)
    return lane.to_host(soft)


def encode_case(case, device, pictures, **arguments):
    return encode(encoder_of(case, device, **arguments), pictures, opened(case, device)[2])


# --- towers

def assert_close(got, expected):
    got = got.astype(np.float32).reshape(expected.shape)
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"largest error is {error:.2e} of the largest value, at most {TOLERANCE:.0e} allowed"


@pytest.mark.parametrize(("case", "kind"), PICTURES)
def test_goldens(case, kind):
    golden, seen = Golden(case), {"hidden": [], "features": []}
    _, _, lane = opened(case, "cpu")
    got = encode(encoder_of(case), golden_pictures(case, kind), lane,
                 lambda name, array: seen[name].append(lane.to_host(array).copy()))
    assert_close(got, golden[kind + ".soft_tokens"])
    assert_close(seen["features"][0], golden[kind + ".features"])
    if kind == "images":
        for states, expected in zip(seen["hidden"], golden["image0.vision_hidden"], strict=True):
            assert_close(states[:len(expected)], expected)


def test_the_multimodal_vector():
    """Soft tokens of one picture of 6 x 9 patches through a tower of 24 values, with bounds and standardisation, whose
    weights and pixels are formulas. Source: HF transformers 5.23, float32."""
    vision = {"model_type": "gemma4_vision", "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12, "position_embedding_size": 32,
              "pooling_kernel_size": 3, "patch_size": 2, "standardize": True, "use_clipped_linears": True}
    spec = describe(Config({**VECTORS["G1"].config, "vision_config": vision}))
    lane, tower = open_lane("cpu", "auto"), spec.media.tower
    encoder = VisionEncoder(spec, formula_weights(tower, spec.hidden), lane)
    n_rows, n_columns = 6, 9
    at, values = positions(n_rows, n_columns), np.float32(0.5 + 0.5 * np.sin(0.11 * np.arange(54 * 12)))
    groups = windows(n_rows, n_columns, 3)
    soft = np.zeros((6, spec.hidden), np.float32)
    places, rows = KINDS[Gemma4TowerSpec].places(tower, at), np.arange(6, dtype=np.int32)
    encoder.run(VisionInputs(2 * (values.reshape(54, 12) - np.float32(0.5)), at, places, groups, rows, rows,
                             pages([0, 54])), soft)
    np.testing.assert_allclose(soft[0, :4], [0.15842, -0.23585, 0.38459, 0.79185], rtol=0, atol=AGREEMENT + 0.5e-5)
    np.testing.assert_allclose(soft[5, -2:], [0.24621, 0.01855], rtol=0, atol=AGREEMENT + 0.5e-5)


def formula_weights(tower, hidden):
    weights = VisionWeights.of(tower)
    for target in vision_targets(tower, hidden):
        parts = [value(name, shape).ravel() if order is None else order(value(name, shape).ravel())
                 for name, shape, order in target.pieces()]
        owner, _, attribute = target.name.rpartition(".")
        setattr(weights.layers[int(owner.split(".")[1])] if owner else weights, attribute,
                np.concatenate(parts).reshape(target.shape))
    return weights


# --- bfloat16

@contextmanager
def rounding(name, args, kwargs):
    """Around an op of the NumPy twins: what it reads of a step's input and what it writes is rounded to bfloat16."""
    arguments = signature(getattr(reference, name)).bind(*args, **kwargs).arguments
    is_table = name == "rope_angles"                        # stays in float32
    def cast(*names):
        for array in () if is_table else (arguments.get(n) for n in names):
            if array is not None:
                with np.errstate(invalid="ignore"):                  # what nobody has written yet may be anything
                    array[...] = array.astype(BF16)
    cast("x")
    yield
    cast("out", "residual", "k_pages", "v_pages")


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_good_as_the_same_maths_done_plainly(case):
    """The rule of the goldens for logits, for the soft tokens of the smallest picture: the median error is at most 1.5
    times, the largest at most twice that of the twins with every result rounded to bfloat16."""
    kind = "videos" if case == "gemma4-video" else "images"
    pictures, golden = golden_pictures(case, kind), Golden(case)[kind + ".soft_tokens"]
    i = min(range(len(pictures)), key=lambda j: pictures[j].n_tokens)
    begin = sum(picture.n_tokens for picture in pictures[:i])
    expected = golden[begin:begin + pictures[i].n_tokens]
    plain = encoder_of(case)
    plain.use(traced(reference, rounding))
    soft = encode_case(case, "emulated", [pictures[i]]), encode(plain, [pictures[i]], opened(case, "cpu")[2])
    got, allowed = (np.abs(rows.astype(np.float32) - expected).max(axis=1) / np.abs(expected).max(axis=1)
                    for rows in soft)
    assert 0 < np.median(got) <= 1.5 * np.median(allowed) and got.max() <= 2 * allowed.max()


# --- many pictures

def bits(array):
    return array.view(np.uint16)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_pictures_of_a_batch_have_the_bits_of_each_alone(case):
    encoder, lane = encoder_of(case, "emulated"), opened(case, "emulated")[2]
    pictures = some_pictures(encoder.tower)
    together = encode(encoder, pictures, lane)
    alone = [encode(encoder, [picture], lane) for picture in pictures]
    np.testing.assert_array_equal(bits(together), bits(np.concatenate(alone)))
    backwards = encode(encoder, pictures[::-1], lane)
    np.testing.assert_array_equal(bits(backwards), bits(np.concatenate(alone[::-1])))


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_pictures_of_a_batch_are_close_to_each_alone_on_the_cpu(case):
    """BLAS may add in another order: the project's bound for other batchings."""
    encoder, lane = encoder_of(case), opened(case, "cpu")[2]
    pictures = some_pictures(encoder.tower)
    together = encode(encoder, pictures, lane)
    alone = np.concatenate([encode(encoder, [picture], lane) for picture in pictures])
    assert np.abs(together - alone).max() <= 1e-5 * np.abs(alone).max()


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_more_pictures_than_a_run_holds(case):
    """Split between pictures, where the next one's whole pages do not fit; the bits are those of one run."""
    tower = spec_of(case).media.tower
    pictures = some_pictures(tower)
    largest = max(picture.n_tokens for picture in pictures) * tower.pool_side**2
    encoder = encoder_of(case, "emulated", max_patches=largest)
    assert encoder.max_patches == -(-largest // PAGE) * PAGE
    runs = count_runs(encoder)
    got = encode(encoder, pictures, opened(case, "emulated")[2])
    np.testing.assert_array_equal(bits(got), bits(encode_case(case, "emulated", pictures)))
    # In pages of 16: 4 + 1 of 6, then 6, then 3; 4 of 4 each; 1 of 1 each.
    assert len(runs) == {"gemma3-vision": 3, "gemma4-unified": 4}.get(case, 3)


def count_runs(encoder):
    """A list that grows with each run of an encoder on kernels."""
    runs = []
    @contextmanager
    def around(name, args, kwargs):
        if name == "place_rows":
            runs.append(name)
        yield
    encoder.use(traced(kernels, around))
    return runs


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_rows(device):
    """Soft tokens go where each picture's rows say; other rows stay, and no picture at all changes nothing."""
    case = "gemma4-vision-bidir"
    lane, encoder = opened(case, device)[2], encoder_of(case, device)
    pictures = some_pictures(encoder.tower)[:3]
    expected = encode(encoder, pictures, lane)
    places = np.random.default_rng(0).permutation(40)[:len(expected)].astype(np.int32)
    rows = np.split(places, np.cumsum([picture.n_tokens for picture in pictures])[:-1])
    soft = np.full((40, encoder.spec.hidden), 7, lane.dtype)
    encoder.encode([], soft, [])
    assert (soft == 7).all()
    encoder.encode(pictures, soft, rows)
    np.testing.assert_array_equal(soft[places], expected)
    assert (np.delete(soft, places, axis=0) == 7).all()


# --- memory and copies

def test_on_a_gpu(gpu):
    """The emulated lane's bits; a run is one copy in, waits for nothing, and takes no memory."""
    for case in ONE_OF_EACH:
        lane = CudaLane(0, kernels, BF16)
        with lane.running():
            spec, weights = loaded(Golden(case).checkpoint, lane)
            encoder = VisionEncoder(spec, weights.vision, lane, max_patches=128)
            pictures = some_pictures(encoder.tower)
            got = encode(encoder, pictures, lane)
            soft = lane.to_device(np.zeros(got.shape, BF16))
            ends = np.cumsum([0, *(picture.n_tokens for picture in pictures)])
            runs, before = count_runs(encoder), gpu.counts.copy()
            encoder.encode(pictures, soft, [np.arange(*span, dtype=np.int32) for span in pairwise(ends)])
            used = gpu.counts - before
            assert used["copies in"] == len(runs) == {"gemma3-vision": 2, "gemma4-unified": 1}.get(case, 3)
            assert not used["allocations"] + used["pinned allocations"] + used["copies out"]
            np.testing.assert_array_equal(bits(lane.to_host(soft)), bits(got))
        np.testing.assert_array_equal(bits(got), bits(encode_case(case, "emulated", pictures)))


@pytest.mark.parametrize("tower", TOWERS)
def test_what_is_planned_is_what_is_taken(gpu, tower):
    """But for the frequencies of RoPE, a few hundred bytes."""
    lane = CudaLane(0, kernels, BF16)
    spec = SimpleNamespace(media=SimpleNamespace(tower=tower), hidden=64, norm_offset=0.0)
    with lane.running():
        scratch = Scratch.of(kernels.vision_scratch_size(tower, 64, run_patches(tower)), lane)
        before = lane.memory_bytes()
        encoder = VisionEncoder(spec, VisionWeights.of(tower), lane, scratch)
        taken = before - lane.memory_bytes()
        assert 0 <= taken - VisionEncoder.n_bytes(spec, 2) <= 1024
    assert encoder.max_patches % PAGE == 0 and encoder.max_patches >= tower.most_patches


def test_patches_of_a_run():
    """The largest picture, or a batch of them where patches are small: what is sent to the lane stays below 16 MB."""
    for tower in (Gemma4TowerSpec(1152, 4304, 27, 16, 72), SiglipSpec(1152, 4304, 27, 16), BlockEmbedderSpec(3840)):
        n = run_patches(tower)
        assert n >= tower.most_patches and 2 * n * tower.patch_width < 16 << 20


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("seed", range(8))
def test_any_run_fits_the_buffer(tower, seed):
    """Runs full of pictures of any sizes, the smallest among them: a page each."""
    rng, lane, max_patches = np.random.default_rng(seed), HostLane("emulated", None, BF16), 256
    shapes, n = [], 0
    while True:
        shape = (4, 4) if type(tower) is SiglipSpec else tuple(rng.integers(1, 2 + seed % 4, 2).tolist())
        n += -(-np.prod(shape) * tower.pool_side**2 // PAGE) * PAGE
        if n > max_patches:
            break
        shapes.append(shape)
    pictures = random_pictures(tower, shapes)
    stager = VisionStager(KINDS[type(tower)], tower, max_patches, lane)
    rows = [np.arange(picture.n_tokens, dtype=np.int32) for picture in pictures]
    inputs = stager(pictures, rows)
    assert len(inputs.patches) == sum(picture.n_tokens for picture in pictures) * tower.pool_side**2
    assert inputs.patches.dtype == BF16 and inputs.rows.tolist() == np.concatenate(rows).tolist()


@pytest.mark.parametrize(("tower", "shapes"), [
    (TOWERS[0], [(1, 113)]), (replace(TOWERS[0], pool=4), 64 * [(1, 1)]), (TOWERS[1], 16 * [(4, 4)]),
    (TOWERS[2], [(32, 32)])])
def test_a_run_without_a_gap_fits_the_buffer(tower, shapes):
    lane, max_patches, pictures = HostLane("emulated", None, BF16), 1024, random_pictures(tower, shapes)
    rows = [np.arange(picture.n_tokens, dtype=np.int32) for picture in pictures]
    inputs = VisionStager(KINDS[type(tower)], tower, max_patches, lane)(pictures, rows)
    assert max_patches - PAGE < len(inputs.patches) <= max_patches


def test_a_tower_that_nobody_knows():
    with pytest.raises(TypeError, match="no branch for SimpleNamespace"):
        VisionEncoder(SimpleNamespace(media=SimpleNamespace(tower=SimpleNamespace())), None, None)
