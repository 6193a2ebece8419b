"""Safetensors: a checkpoint's tensors by name. Every header is checked whole before a byte of data is used.

A file is 8 bytes with the header's length (little-endian), the header, {name: {dtype, shape, data_offsets}} as JSON,
and the data, in which every byte belongs to exactly one tensor.
Source: github.com/huggingface/safetensors, README, "Format".
"""

import math
import mmap
import os
import reprlib
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from loaders.errors import CheckpointError
from loaders.json_file import parse_json, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000      # the limit of the format's own reader
MAX_DIMS = 32                       # the most that NumPy 1 can hold
SCRATCH_BYTES = 1 << 20             # one block of a conversion: it stays in the L2 cache between read and cast
N_READERS = 2                       # the read and the cast both release the GIL, so one reads while the other casts

# dtype -> (bits of an element, its NumPy dtype); None for packed and scaled formats, which need more than these bytes
DTYPES = {
    "BOOL": (8, np.bool_), "U8": (8, np.uint8), "I8": (8, np.int8), "U16": (16, np.uint16), "I16": (16, np.int16),
    "U32": (32, np.uint32), "I32": (32, np.int32), "U64": (64, np.uint64), "I64": (64, np.int64),
    "BF16": (16, ml_dtypes.bfloat16), "F16": (16, np.float16), "F32": (32, np.float32), "F64": (64, np.float64),
    "C64": (64, np.complex64), "F4": (4, None), "F6_E2M3": (6, None), "F6_E3M2": (6, None), "F8_E4M3": (8, None),
    "F8_E5M2": (8, None), "F8_E8M0": (8, None), "F8_E4M3FNUZ": (8, None), "F8_E5M2FNUZ": (8, None),
}
WEIGHT_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. start and end are byte offsets from the start of the file at `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int

    @property
    def n_bytes(self):
        return self.end - self.start


class Checkpoint:
    """The tensors of a checkpoint directory, from one file or from the shards of an index.

    tensors     {name: TensorInfo}, in the order in which they lie in the files

    Open with `Checkpoint.open`; close it, or use it in a `with`. Its methods may be called from several threads.
    """

    def __init__(self, tensors, files, stack):
        self.tensors = tensors
        self._files = files                 # {path: the open file, unbuffered}
        self._maps = {}                     # {path: mmap}, made by the first view
        self._lock = threading.Lock()       # a file has one position: seek and read go together
        self._pool = stack.enter_context(ThreadPoolExecutor(N_READERS))
        self._stack = stack                 # closes the files and the pool

    @classmethod
    def open(cls, directory):
        """Finds model.safetensors, or model.safetensors.index.json and its shards, or the only *.safetensors file.

        Raises CheckpointError for anything missing, and for any header that is not exactly what the format allows.
        """
        directory = Path(directory)
        weight_map = None
        if not (directory / SINGLE_FILE).is_file() and (directory / INDEX_FILE).is_file():
            weight_map = _read_index(directory / INDEX_FILE)
            paths = [directory / shard for shard in sorted(set(weight_map.values()))]
        else:
            paths = [_only_file(directory)]
        tensors, files = {}, {}
        with ExitStack() as stack:
            for path in paths:
                try:
                    files[path] = stack.enter_context(open(path, "rb", buffering=0))
                    found = _read_header(path, files[path])
                except OSError as error:
                    raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
                for info in found:
                    if info.name in tensors:
                        raise CheckpointError(f"{path.name}: {info.name} is already in {tensors[info.name].path.name}")
                    tensors[info.name] = info
            if weight_map is not None:
                _check_index(weight_map, tensors)
            return cls(tensors, files, stack.pop_all())

    @property
    def n_bytes(self):
        """Bytes of tensor data in all files together."""
        return sum(info.n_bytes for info in self.tensors.values())

    def view(self, name):
        """The tensor as it lies in the file: a read-only array on mapped memory, of the file's own dtype.

        The pages that it touches stay resident while it lives; it outlives `close`. To load weights, use `read_range`.
        Raises CheckpointError for a packed dtype or a file cut since it was opened.
        """
        info = self._info(name)
        dtype = DTYPES[info.dtype][1]
        if dtype is None:
            raise CheckpointError(f"{info.path.name}: {name} is {info.dtype}, which is not supported yet")
        file = self._files[info.path]
        if os.fstat(file.fileno()).st_size < info.end:      # touching a page past the end would kill the process
            raise _cut(info, file)
        if info.path not in self._maps:
            self._maps[info.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.ndarray(info.shape, dtype, buffer=self._maps[info.path], offset=info.start)

    def read_range(self, name, begin, end, out):
        """out[...] = elements begin..end of the flat tensor, converted; returns the bytes it read. No copy of the file
        is left in memory.

        out     [end - begin], float32 or bfloat16, contiguous. From BF16 and F16 to float32 is exact; to bfloat16, F16
                and F32 round to nearest even.
        Raises CheckpointError for a dtype that is not BF16, F16 or F32 and for a file cut since it was opened;
        ValueError for an `out` of the wrong kind, or a range that is not the tensor's.
        """
        info = self._info(name)
        if info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{info.path.name}: {name} is {info.dtype}, which is not supported as a weight yet; "
                                  f"expected {', '.join(WEIGHT_DTYPES)}")
        if not 0 <= begin <= end <= math.prod(info.shape) or out.shape != (end - begin,):
            raise ValueError(f"elements {begin}..{end} of {name} {list(info.shape)} into {list(out.shape)}, "
                             "expected a range of the tensor's, and a flat array for it")
        if out.dtype not in (np.float32, ml_dtypes.bfloat16) or not out.flags.c_contiguous:
            raise ValueError(f"read_range: out is {out.dtype}, strides {out.strides}; "
                             "expected contiguous float32 or bfloat16")
        n_bytes = out.size * DTYPES[info.dtype][0] // 8
        if n_bytes < 2 * SCRATCH_BYTES:
            self._read_part(info, begin, out)
        else:
            middle = out.size // 2
            parts = [self._pool.submit(self._read_part, info, begin + at, part)
                     for at, part in ((0, out[:middle]), (middle, out[middle:]))]
            for part in parts:
                part.result()           # raises what it raised
        return n_bytes

    def close(self):
        """Closes the files. Arrays from `view` stay valid. May be called again."""
        self._maps.clear()
        self._stack.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def _info(self, name):
        if name not in self.tensors:
            raise CheckpointError(f"{next(iter(self._files)).parent}: no tensor is named {name}")
        info = self.tensors[name]
        if self._files[info.path].closed:
            raise ValueError(f"{info.path.name}: {name} was asked for after the checkpoint was closed")
        return info

    def _read_part(self, info, begin, out):
        """out[...] = elements from `begin` of the flat tensor. out [n_elements] float32 or bfloat16."""
        dtype = np.dtype(DTYPES[info.dtype][1])
        position, at = info.start + begin * dtype.itemsize, 0
        if dtype == out.dtype:
            self._read_at(info, position, out)
            return
        scratch = np.empty(min(out.size, SCRATCH_BYTES // dtype.itemsize), dtype)
        while at < out.size:
            block = scratch[:out.size - at]
            self._read_at(info, position, block)
            with np.errstate(invalid="ignore"):     # a signalling NaN is data here
                out[at:at + block.size] = block
            at, position = at + block.size, position + block.nbytes

    def _read_at(self, info, position, array):
        """Fills a contiguous 1-D array with the bytes at `position` of the file."""
        file, rest = self._files[info.path], memoryview(array.view(np.uint8))
        while rest:
            with self._lock:
                file.seek(position)
                n_read = file.readinto(rest)
            if not n_read:
                raise _cut(info, file)
            rest, position = rest[n_read:], position + n_read


def _cut(info, file):
    return CheckpointError(f"{info.path.name}: {info.name} needs bytes {info.start}..{info.end}, the file ends at "
                           f"{os.fstat(file.fileno()).st_size}: it was cut after it was opened")


def _only_file(directory):
    """model.safetensors, else the one *.safetensors file of the directory."""
    if (directory / SINGLE_FILE).is_file():
        return directory / SINGLE_FILE
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found) or "no *.safetensors file"
    raise CheckpointError(f"{directory}: found {names}; expected {SINGLE_FILE}, or {INDEX_FILE} and the files it names")


def _read_index(path):
    """{tensor name: shard file name} of an index file; every shard named exists in the same directory."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path.name}: weight_map is {reprlib.repr(weight_map)}, expected {{tensor: file name}}")
    exists = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", "..") or "\\" in shard:
            raise CheckpointError(f"{path.name}: {name} is in {reprlib.repr(shard)}, expected a plain file name")
        if shard not in exists:
            exists[shard] = (path.parent / shard).is_file()
        if not exists[shard]:
            raise CheckpointError(f"{path.name}: {name} is in {shard}, and {path.parent} has no such file")
    return weight_map


def _check_index(weight_map, tensors):
    """Every tensor of the index is in the shard that it names, and the shards hold no other tensor."""
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{shard}: has no {name}, which {INDEX_FILE} says it holds")
        if tensors[name].path.name != shard:
            raise CheckpointError(f"{tensors[name].path.name}: holds {name}, which {INDEX_FILE} says is in {shard}")
    for name, info in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{info.path.name}: holds {name}, which {INDEX_FILE} does not name")


def _read_header(path, file):
    """The TensorInfos of one file, in the order of their bytes. Raises CheckpointError."""
    n_file = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if prefix == b"version ":
        raise CheckpointError(f"{path.name}: is a git-lfs pointer, not the weights; `git lfs pull` fetches them")
    n_header = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 0 < n_header <= min(n_file - 8, MAX_HEADER_BYTES):
        raise CheckpointError(f"{path.name}: the header's length is {n_header} bytes, expected 1 to "
                              f"{min(max(n_file - 8, 0), MAX_HEADER_BYTES)} in a file of {n_file} bytes")
    header = parse_json(file.read(n_header), f"{path.name}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path.name}: __metadata__ is {reprlib.repr(metadata)}, expected an object of strings")
    data_start = 8 + n_header
    found = [_tensor_info(path, name, entry, data_start, n_file) for name, entry in header.items()]
    found.sort(key=lambda info: (info.start, info.end))
    position, before = data_start, "the header"
    for info in found:
        if info.start != position:
            what = f"overlaps {before}" if info.start < position else f"leaves a hole after {before}"
            raise CheckpointError(f"{path.name}: {info.name} is bytes {info.start}..{info.end} and {what}, "
                                  f"which ends at {position}")
        position, before = info.end, info.name
    if position != n_file:
        raise CheckpointError(f"{path.name}: {before} ends at {position}, the file at {n_file}: "
                              f"{n_file - position} bytes belong to no tensor")
    return found


def _tensor_info(path, name, entry, data_start, n_file):
    """One header entry, checked by itself. Python ints throughout: nothing overflows."""
    def fault(text):
        return CheckpointError(f"{path.name}: {name} {text}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fault(f"is {reprlib.repr(entry)}, expected an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fault(f"has dtype {reprlib.repr(dtype)}, expected one of {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMS:
        raise fault(f"has shape {reprlib.repr(shape)}, expected at most {MAX_DIMS} whole numbers from 0")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fault(f"has data_offsets {reprlib.repr(offsets)}, expected [begin, end] with 0 <= begin <= end")
    start, end = data_start + offsets[0], data_start + offsets[1]
    if end > n_file:
        raise fault(f"needs bytes {start}..{end}, the file ends at {n_file}")
    n_bits = math.prod(shape) * DTYPES[dtype][0]
    if n_bits != 8 * (end - start):
        raise fault(f"is {shape} {dtype}, which takes {-(-n_bits // 8)} bytes, and has {end - start} "
                    f"({start}..{end})")
    return TensorInfo(name, dtype, tuple(shape), path, start, end)


def _are_counts(value):
    """Whether a JSON value is a list of whole numbers that an int64 can hold; true and 1.0 are not numbers here."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
