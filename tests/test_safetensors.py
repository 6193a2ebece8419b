"""loaders/safetensors.py: every fault of a file is one clear error before its data is used; values arrive exactly."""

import json
import os
import struct
import tracemalloc
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loaders import safetensors
from loaders.errors import CheckpointError
from loaders.safetensors import DTYPES, Checkpoint

BF16 = ml_dtypes.bfloat16
GOLDENS = sorted((Path(__file__).parent / "goldens").glob("*/checkpoint"))


def write(path, header, data=b"", length=None):
    """A file from a header (dict, or bytes as they are), the data, and if given a false header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape, begin, end, dtype="BF16"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read_whole(checkpoint, name, out):
    """out[...] = the tensor."""
    assert checkpoint.read_range(name, 0, out.size, out.reshape(-1)) == checkpoint.tensors[name].n_bytes


def refuses(directory, *expected):
    """Checkpoint.open raises one CheckpointError that holds every text of `expected`."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    for text in expected:
        assert text in str(caught.value)


@pytest.fixture
def model(tmp_path):
    return tmp_path / "model.safetensors"


# --- finding files

def test_directories_without_a_checkpoint(tmp_path):
    refuses(tmp_path / "absent", "absent: no such directory")
    refuses(tmp_path, "no *.safetensors file", "model.safetensors.index.json")
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "one.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "two.safetensors")
    refuses(tmp_path, "one.safetensors, two.safetensors", "expected model.safetensors")


def test_a_directory_in_the_place_of_a_shard(tmp_path):
    (tmp_path / "odd.safetensors").mkdir()
    refuses(tmp_path, "odd.safetensors: cannot be read")


def test_git_lfs_pointer(model):
    model.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    refuses(model.parent, "git lfs pull")


# --- shards

@pytest.fixture
def sharded(tmp_path):
    """a in the first shard, b and c in the second."""
    save_file({"a": np.arange(4, dtype=np.float32)}, tmp_path / "one.safetensors")
    save_file({"b": np.ones((2, 3), np.float32), "c": np.zeros(0, np.float32)}, tmp_path / "two.safetensors")
    put_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return tmp_path


def put_index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_one_checkpoint(sharded):
    with Checkpoint.open(sharded) as checkpoint:
        assert {name: info.path.name for name, info in checkpoint.tensors.items()} == {
            "a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
        assert checkpoint.n_bytes == 16 + 24
        assert checkpoint.view("a").tolist() == [0, 1, 2, 3]
        assert checkpoint.view("b").tolist() == [[1, 1, 1]] * 2
        assert checkpoint.view("c").shape == (0,)


def test_missing_shard_is_named_with_a_tensor(sharded):
    (sharded / "two.safetensors").unlink()
    refuses(sharded, "b is in two.safetensors", "has no such file")


def test_index_and_shards_must_agree(sharded):
    full = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    put_index(sharded, {**full, "d": "two.safetensors"})
    refuses(sharded, "two.safetensors: has no d")
    put_index(sharded, {**full, "b": "one.safetensors"})
    refuses(sharded, "two.safetensors: holds b", "is in one.safetensors")
    put_index(sharded, {"a": "one.safetensors", "b": "two.safetensors"})
    refuses(sharded, "two.safetensors: holds c", "does not name")


def test_one_tensor_in_two_shards(sharded):
    save_file({"a": np.arange(4, dtype=np.float32)}, sharded / "two.safetensors")
    refuses(sharded, "two.safetensors: a is already in one.safetensors")


@pytest.mark.parametrize("shard", ["../one.safetensors", "/one.safetensors", "x/one.safetensors", "x\\one", "..", ".",
                                   "", 3, None])
def test_shard_names_stay_in_the_directory(sharded, shard):
    put_index(sharded, {"a": shard})
    refuses(sharded, "a is in", "expected a plain file name")


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"\xff",
                                  b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}'])
def test_broken_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_bytes(text)
    refuses(sharded, "model.safetensors.index.json")


# --- headers

HOSTILE = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "length 0": struct.pack("<Q", 0) + b"{}",
    "length 2^63": struct.pack("<Q", 2**63) + b"{}",
    "length 2^64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "one byte too long": struct.pack("<Q", 3) + b"{}",
    "not JSON": struct.pack("<Q", 4) + b"{'a'",
    "not an object": struct.pack("<Q", 2) + b"[]",
    "not UTF-8": struct.pack("<Q", 4) + b'{"\xff"',
    "UTF-16": struct.pack("<Q", 6) + "{}".encode("utf-16"),
    "bottomless": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "endless number": struct.pack("<Q", 200_008) + b'{"a": 1' + b"0" * 200_000 + b"}",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_header_costs_no_memory(model, what):
    model.write_bytes(HOSTILE[what])
    tracemalloc.start()
    refuses(model.parent, "model.safetensors: ", "header")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_header_length_has_a_cap_below_the_file_size(model):
    with open(model, "wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)          # sparse
    tracemalloc.start()
    refuses(model.parent, "header's length is 200000000 bytes", "expected 1 to 100000000")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_duplicate_tensor(model):
    one = json.dumps(entry([2], 0, 4))
    write(model, f'{{"w": {one}, "w": {one}}}'.encode(), bytes(4))
    refuses(model.parent, "model.safetensors: header", "'w' stands twice")


@pytest.mark.parametrize(("fields", "expected"), [
    (None, "is None, expected an object"),
    ([], "is [], expected an object"),
    ({"dtype": "BF16", "shape": [2]}, "expected an object of dtype, shape and data_offsets"),
    ({**entry([2], 0, 4), "stride": 1}, "expected an object of dtype, shape and data_offsets"),
    (entry([2], 0, 4, "BF17"), "has dtype 'BF17', expected one of BOOL"),
    (entry([2], 0, 4, ["BF16"]), "has dtype ['BF16'], expected one of"),
    (entry(2, 0, 4), "has shape 2"),
    (entry([-2], 0, 4), "has shape [-2]"),
    (entry([-1, -2], 0, 4), "has shape [-1, -2]"),
    (entry([2.0], 0, 4), "has shape [2.0]"),
    (entry([True, 2], 0, 4), "has shape [True, 2]"),
    (entry([2**64], 0, 4), "has shape [18446744073709551616]"),
    (entry([1] * 33, 0, 2), "expected at most 32"),
    (entry([2], -4, 0), "has data_offsets [-4, 0]"),
    (entry([2], 4, 0), "has data_offsets [4, 0]"),
    ({**entry([2], 0, 4), "data_offsets": [0, 2, 4]}, "has data_offsets [0, 2, 4]"),
    ({**entry([2], 0, 4), "data_offsets": "04"}, "has data_offsets '04'"),
    (entry([3], 0, 4), "is [3] BF16, which takes 6 bytes, and has 4"),
    (entry([2], 0, 4, "F32"), "is [2] F32, which takes 8 bytes, and has 4"),
    (entry([2**32, 2**32], 0, 0), f"which takes {2**65} bytes, and has 0"),
    (entry([2**62] * 32, 0, 4), "bytes, and has 4"),
    (entry([7], 0, 4, "F4"), "is [7] F4, which takes 4 bytes, and has 4"),
])
def test_entry_is_checked(model, fields, expected):
    write(model, {"w": fields}, bytes(4))
    refuses(model.parent, "model.safetensors: w ", expected)


@pytest.mark.parametrize("metadata", [3, {"format": 1}, {"format": {}}])
def test_metadata_is_strings(model, metadata):
    write(model, {"__metadata__": metadata, "w": entry([2], 0, 4)}, bytes(4))
    refuses(model.parent, "__metadata__")


def test_truncated_file_names_the_bytes(model):
    save_file({"mlp.weight": np.zeros((64, 8), np.float32)}, model)
    n_full = model.stat().st_size
    os.truncate(model, n_full - 1)
    refuses(model.parent, f"model.safetensors: mlp.weight needs bytes {n_full - 2048}..{n_full}, "
                          f"the file ends at {n_full - 1}")


def test_every_byte_belongs_to_one_tensor(model):
    first = entry([2], 0, 4)
    write(model, {"a": first, "b": entry([2], 2, 6)}, bytes(6))
    refuses(model.parent, "b is bytes", "overlaps a")
    write(model, {"a": first, "b": first}, bytes(4))
    refuses(model.parent, "overlaps a")
    write(model, {"a": entry([4], 0, 8), "b": entry([0], 4, 4)}, bytes(8))
    refuses(model.parent, "b is bytes", "overlaps a")
    write(model, {"a": first, "b": entry([2], 6, 10)}, bytes(10))
    refuses(model.parent, "b is bytes", "leaves a hole after a")
    write(model, {"a": entry([2], 2, 6)}, bytes(6))
    refuses(model.parent, "leaves a hole after the header")
    write(model, {"a": first}, bytes(7))
    refuses(model.parent, "3 bytes belong to no tensor")
    write(model, {}, bytes(1))
    refuses(model.parent, "1 bytes belong to no tensor")


def test_order_in_the_header_is_free(model):
    write(model, {"b": entry([], 4, 6), "empty": entry([3, 0], 4, 4), "a": entry([2], 0, 4)}, bytes(6))
    with Checkpoint.open(model.parent) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "empty", "b"]
        assert checkpoint.tensors["b"].shape == ()


# --- values

@pytest.mark.parametrize("directory", GOLDENS, ids=lambda path: path.parent.name)
def test_real_layouts_read_as_the_reference_reader_reads_them(directory):
    expected = {name: array for file in directory.glob("*.safetensors") for name, array in load_file(file).items()}
    with Checkpoint.open(directory) as checkpoint:
        assert expected and set(checkpoint.tensors) == set(expected)
        assert checkpoint.n_bytes == sum(array.nbytes for array in expected.values())
        for name, array in expected.items():
            view, out = checkpoint.view(name), np.empty(array.shape, np.float32)
            assert view.dtype == array.dtype
            assert view.tobytes() == array.tobytes()
            read_whole(checkpoint, name, out)
            assert np.array_equal(out, array.astype(np.float32))


def test_every_bfloat16_is_exact_in_float32(model):
    """All 65536 bit patterns: a bfloat16 is the upper half of its float32."""
    patterns = np.arange(2**16, dtype=np.uint16)
    save_file({"w": patterns.view(BF16)}, model)
    out = np.empty(2**16, np.float32)
    with Checkpoint.open(model.parent) as checkpoint, warnings.catch_warnings():
        warnings.simplefilter("error")
        read_whole(checkpoint, "w", out)
    assert np.array_equal(out.view(np.uint32), patterns.astype(np.uint32) << 16)


def test_every_float16_is_exact_in_float32(model):
    patterns = np.arange(2**16, dtype=np.uint16)
    save_file({"w": patterns.view(np.float16)}, model)
    out = np.empty(2**16, np.float32)
    with Checkpoint.open(model.parent) as checkpoint, warnings.catch_warnings():
        warnings.simplefilter("error")
        read_whole(checkpoint, "w", out)
    sign, exponent, fraction = patterns >> 15, (patterns >> 10) & 31, patterns & 1023
    finite = exponent < 31
    expected = np.ldexp((fraction + 1024 * (exponent > 0)).astype(np.float64),
                        np.maximum(exponent, 1).astype(int) - 25) * np.where(sign, -1.0, 1.0)
    assert np.array_equal(out[finite], expected[finite].astype(np.float32))
    assert np.array_equal(np.signbit(out[finite]), sign[finite] == 1)
    assert np.array_equal(np.isinf(out), ~finite & (fraction == 0))
    assert np.array_equal(np.isnan(out), ~finite & (fraction > 0))


def test_float32_is_copied_and_rounds_to_bfloat16(model):
    values = np.array([0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1e-45, np.inf, -np.inf, np.nan,
                       3.3e38], np.float32)
    values[9:10].view(np.uint32)[0] = 0x7F800001        # a signalling NaN, of which no warning is made
    save_file({"w": values}, model)
    same, rounded = np.empty_like(values), np.empty(values.shape, BF16)
    with Checkpoint.open(model.parent) as checkpoint, warnings.catch_warnings():
        warnings.simplefilter("error")
        read_whole(checkpoint, "w", same)
        read_whole(checkpoint, "w", rounded)
    assert same.tobytes() == values.tobytes()
    nearest_even = [0.0, -0.0, 1.0, 1.0, 1 + 2**-6, 1 + 2**-7, 0.0, np.inf, -np.inf, np.nan, 3.3e38]
    np.testing.assert_array_equal(rounded.astype(np.float64), np.array(nearest_even).astype(BF16).astype(np.float64))


@pytest.mark.parametrize("source", [BF16, np.float16, np.float32])
@pytest.mark.parametrize("target", [BF16, np.float32])
@pytest.mark.parametrize("n_more", [-1, 0, 1])
def test_large_tensors_arrive_whole(model, source, target, n_more):
    """Around the sizes where one read becomes blocks, and two threads share them."""
    n = 2 * safetensors.SCRATCH_BYTES // np.dtype(source).itemsize + n_more
    values = np.random.default_rng(n).standard_normal(n, np.float32).astype(source)
    save_file({"before": np.zeros(3, np.float16), "w": values, "x": np.ones(1, np.float16)}, model)
    out = np.full(n, 7, target)
    with Checkpoint.open(model.parent) as checkpoint:
        read_whole(checkpoint, "w", out)
    assert out.tobytes() == values.astype(target).tobytes()


@pytest.mark.parametrize("source", [BF16, np.float16, np.float32])
@pytest.mark.parametrize("target", [BF16, np.float32])
def test_any_range_is_that_of_the_whole(model, source, target):
    """Ranges of every length and place; nothing beside them is written."""
    values = np.random.default_rng(0).standard_normal((5, 7), np.float32).astype(source)
    save_file({"before": np.zeros(3, np.float16), "w": values, "x": np.ones(1, np.float16)}, model)
    expected = values.astype(target).reshape(-1)
    with Checkpoint.open(model.parent) as checkpoint:
        for begin in range(36):
            for end in range(begin, 36):
                out = np.full(37, 7, target)
                n_bytes = checkpoint.read_range("w", begin, end, out[1:1 + end - begin])
                assert n_bytes == (end - begin) * values.itemsize
                assert out[1:1 + end - begin].tobytes() == expected[begin:end].tobytes()
                assert out[0] == 7 and (out[1 + end - begin:] == 7).all()


def test_a_large_range_in_the_middle(model):
    """Where two threads share it, each finds its own place."""
    values = np.random.default_rng(1).standard_normal(3 * safetensors.SCRATCH_BYTES, np.float32).astype(BF16)
    save_file({"w": values}, model)
    begin, end = 1000, 1000 + 5 * safetensors.SCRATCH_BYTES // 2
    for target in (BF16, np.float32):
        out = np.empty(end - begin, target)
        with Checkpoint.open(model.parent) as checkpoint:
            checkpoint.read_range("w", begin, end, out)
        np.testing.assert_array_equal(out, values[begin:end].astype(target))


def test_rows_of_a_larger_array(model):
    q = np.random.default_rng(0).standard_normal((6, 8), np.float32).astype(BF16)
    k = np.random.default_rng(1).standard_normal((2, 8), np.float32).astype(BF16)
    save_file({"q": q, "k": k}, model)
    fused = np.full((10, 8), 7, np.float32)
    with Checkpoint.open(model.parent) as checkpoint:
        read_whole(checkpoint, "q", fused[1:7])
        read_whole(checkpoint, "k", fused[7:9])
    np.testing.assert_array_equal(fused[1:9], np.concatenate([q, k]).astype(np.float32))
    assert (fused[[0, 9]] == 7).all()


def test_scalars_and_empty_tensors(model):
    write(model, {"s": entry([], 0, 2), "e": entry([0, 4], 2, 2)}, np.array(2.5, BF16).tobytes())
    scalar, empty = np.empty((), np.float32), np.empty((0, 4), np.float32)
    with Checkpoint.open(model.parent) as checkpoint:
        read_whole(checkpoint, "s", scalar)
        read_whole(checkpoint, "e", empty)
        assert checkpoint.view("e").shape == (0, 4)
    assert scalar == 2.5


def test_out_must_fit(model):
    save_file({"w": np.zeros((4, 6), np.float32)}, model)
    with Checkpoint.open(model.parent) as checkpoint:
        for begin, end, out in ((0, 24, np.empty((4, 6), np.float32)), (0, 24, np.empty(23, np.float32)),
                                (-1, 4, np.empty(5, np.float32)), (20, 25, np.empty(5, np.float32)),
                                (3, 2, np.empty(0, np.float32))):
            with pytest.raises(ValueError, match=r"elements .* of w \[4, 6\] into .*, expected a range"):
                checkpoint.read_range("w", begin, end, out)
        for wrong in (np.empty(24), np.empty(48, np.float32)[::2], np.empty(24, np.int32)):
            with pytest.raises(ValueError, match="expected contiguous float32 or bfloat16"):
                checkpoint.read_range("w", 0, 24, wrong)
        with pytest.raises(CheckpointError, match="no tensor is named v"):
            checkpoint.view("v")


# --- dtypes

@pytest.mark.parametrize("dtype", [name for name, (_, array) in DTYPES.items() if array is not None])
def test_view_has_the_dtype_of_the_file(model, dtype):
    n_bytes = 8 * DTYPES[dtype][0] // 8
    write(model, {"odd": entry([1], 0, 1, "U8"), "w": entry([2, 4], 1, 1 + n_bytes, dtype)}, bytes(1 + n_bytes))
    with Checkpoint.open(model.parent) as checkpoint:
        view = checkpoint.view("w")
        assert (view.dtype, view.shape, view.flags.writeable) == (DTYPES[dtype][1], (2, 4), False)
        assert not view.any()


@pytest.mark.parametrize("dtype", [name for name, (_, array) in DTYPES.items() if array is None])
def test_packed_dtypes_are_refused_by_name_when_read(model, dtype):
    """A file may hold them where nothing reads them."""
    n_bytes = 8 * DTYPES[dtype][0] // 8
    write(model, {"packed": entry([8], 0, n_bytes, dtype), "w": entry([1], n_bytes, n_bytes + 2)}, bytes(n_bytes + 2))
    with Checkpoint.open(model.parent) as checkpoint:
        assert checkpoint.view("w").tolist() == [0]
        for read in (checkpoint.view, lambda name: read_whole(checkpoint, name, np.empty(8, np.float32))):
            with pytest.raises(CheckpointError, match=f"packed is {dtype}, which is not supported"):
                read("packed")


def test_integers_are_no_weights(model):
    save_file({"w": np.arange(3)}, model)
    with Checkpoint.open(model.parent) as checkpoint:
        assert checkpoint.view("w").tolist() == [0, 1, 2]
        with pytest.raises(CheckpointError, match="w is I64, which is not supported as a weight yet; expected BF16"):
            read_whole(checkpoint, "w", np.empty(3, np.float32))


# --- files that change, files that close

@pytest.mark.parametrize("target", [BF16, np.float32])
@pytest.mark.parametrize("n", [1000, 4 * safetensors.SCRATCH_BYTES])
def test_file_cut_after_it_was_opened(model, target, n):
    save_file({"w": np.zeros(n, BF16)}, model)
    with Checkpoint.open(model.parent) as checkpoint:
        os.truncate(model, model.stat().st_size - 2)
        for read in (checkpoint.view, lambda name: read_whole(checkpoint, name, np.empty(n, target))):
            with pytest.raises(CheckpointError, match=r"model\.safetensors: w needs bytes .*, the file ends at .*cut"):
                read("w")


def test_close(model):
    save_file({"w": np.arange(4, dtype=np.float32)}, model)
    checkpoint = Checkpoint.open(model.parent)
    view = checkpoint.view("w")
    checkpoint.close()
    checkpoint.close()
    assert view.tolist() == [0, 1, 2, 3]
    for read in (checkpoint.view, lambda name: read_whole(checkpoint, name, np.empty(4, np.float32))):
        with pytest.raises(ValueError, match="after the checkpoint was closed"):
            read("w")


def test_a_refused_directory_leaves_no_file_open(sharded, recwarn):
    """An unclosed file warns when it is collected."""
    put_index(sharded, {"a": "one.safetensors", "b": "two.safetensors"})
    refuses(sharded, "does not name")
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]


def test_reading_leaves_no_copy_of_the_file(model):
    """A conversion needs two blocks, whatever the tensor's size."""
    n = 16 * safetensors.SCRATCH_BYTES // 2
    save_file({"w": np.zeros(n, BF16)}, model)
    out = np.empty(n, np.float32)
    with Checkpoint.open(model.parent) as checkpoint:
        tracemalloc.start()
        read_whole(checkpoint, "w", out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 3 * safetensors.SCRATCH_BYTES
