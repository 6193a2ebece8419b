"""What one checked launch sees of memory: its arguments copied into an arena with space between, and its traffic."""

import bisect
import ctypes
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from engine.errors import KernelError

GAP_BYTES = 1 << 16             # between arguments: an access beside one hits nothing else
KEPT_BYTES = 64 << 20           # an arena above this goes back to the system after the launch
SMALL_BYTES = 64 << 10          # operands below stay in a cache: reading them again is reported apart
VALID, WRITTEN, WRITABLE = 1, 2, 4      # checker.cpp, state of a byte
_lock = threading.Lock()        # there is one arena


@dataclass(frozen=True)
class Line:
    """Traffic of one line of a kernel. space: "global" or "shared"; moved_bytes: 32-byte sectors of global memory."""

    where: str
    space: str
    n_requests: int             # a warp's access is one request
    n_bytes: int                # asked for
    moved_bytes: int
    bank_conflicts: int         # wavefronts beyond those that the size of the accesses needs


@dataclass(frozen=True)
class Traffic:
    """What a launch moved to and from global memory.

    read_bytes, written_bytes  distinct bytes touched
    moved_bytes                32-byte sectors of every warp's request, as if nothing were cached
    small_reread_bytes         the part of moved_bytes that reads operands under 64 KB again
    bank_conflicts             extra wavefronts of all shared accesses
    """

    read_bytes: int
    written_bytes: int
    moved_bytes: int
    small_reread_bytes: int
    bank_conflicts: int
    _library: object = field(repr=False)
    _rows: tuple = field(repr=False)

    @property
    def distinct_bytes(self):
        return self.read_bytes + self.written_bytes

    def lines(self):
        """[Line] in the order of the code's addresses; accesses of one line are summed."""
        wheres = self._library.lines([row[0] - 1 for row in self._rows])
        table = {}
        for where, (_, is_shared, *counts) in zip(wheres, self._rows, strict=True):
            key = where, "shared" if is_shared else "global"
            table[key] = [a + b for a, b in zip(table.get(key, (0,) * len(counts)), counts, strict=True)]
        return [Line(*key, *counts) for key, counts in table.items()]


class Arena(ctypes.Structure):
    """emu::Arena"""

    _fields_ = [(name, ctypes.c_void_p) for name in ("bytes", "state", "read", "written")]


class Watch:
    """The arguments of one launch, in the arena.

    packed    the launch's arguments, pointers into the arena
    segments  one [begin, end) of the arena for each argument, or for those that share bytes; ascending
    counted   the launch's Traffic, once it has ended well
    """

    def __init__(self, library, params, packed, args):
        self.library, self.counted = library, None
        self.arena = Arena()
        library.machine.emu_arena(ctypes.byref(self.arena))
        arrays = [(param, array) for param, array in zip(params, args, strict=True)
                  if param.is_pointer and array is not None]
        arrays.sort(key=lambda pair: pair[1].ctypes.data)
        self.names, segments, self.places = [], [], []
        source_end = 0
        for param, array in arrays:
            begin, n_bytes = array.ctypes.data, array.nbytes
            if segments and begin < source_end:
                self.names[-1] += f", {param.name}"
            else:                                            # as far from a 256-byte boundary as in its allocation
                at = -(-(segments[-1][1] if segments else 0) // 256) * 256 + GAP_BYTES + _offset(array) % 256
                segments.append([at, at])
                self.names.append(param.name)
                source_begin = source_end = begin
            source_end = max(source_end, begin + n_bytes)
            segments[-1][1] = segments[-1][0] + source_end - source_begin
            self.places.append((param, begin, n_bytes, segments[-1][0] + begin - source_begin))
        if segments and segments[-1][1] >= 1 << 32:
            raise KernelError("the checker holds arguments of up to 4 GB")
        self.segments = (ctypes.c_uint64 * 2 * len(segments))(*map(tuple, segments))
        at = {param.name: place for param, _, _, place in self.places}
        self.packed = [ctypes.c_void_p(self.arena.bytes + at[param.name]) if param.name in at else value
                       for param, value in zip(params, packed, strict=True)]

    def fill(self):
        begins = [begin for begin, _ in self.segments]
        states = [VALID] * len(begins)
        for param, source, n_bytes, place in self.places:
            ctypes.memmove(self.arena.bytes + place, source, n_bytes)
            if param.access != "read":
                states[bisect.bisect_right(begins, place) - 1] |= WRITABLE
        for state, (begin, end) in zip(states, self.segments, strict=True):
            ctypes.memset(self.arena.state + begin, state, end - begin)
        for param, _, n_bytes, place in self.places:
            if param.access != "write":
                state = states[bisect.bisect_right(begins, place) - 1]
                ctypes.memset(self.arena.state + place, state | WRITTEN, n_bytes)

    def copy_back(self):
        for param, source, n_bytes, place in self.places:
            if param.access != "read":
                ctypes.memmove(source, self.arena.bytes + place, n_bytes)

    def clear(self):
        for memory in (self.arena.state, self.arena.read, self.arena.written):
            for begin, end in self.segments:
                ctypes.memset(memory + begin, 0, end - begin)
        end = self.segments[-1][1] if len(self.segments) else 0
        if end > KEPT_BYTES:
            for memory in (self.arena.bytes, self.arena.state, self.arena.read, self.arena.written):
                ctypes.CDLL(None).madvise(ctypes.c_void_p(memory), ctypes.c_size_t(end), 4)     # MADV_DONTNEED

    def traffic(self):
        moved = np.zeros(64, np.uint64)
        n_rows = self.library.machine.emu_traffic(ctypes.c_void_p(moved.ctypes.data), None, ctypes.c_size_t(0))
        rows = np.zeros((n_rows, 6), np.uint64)
        self.library.machine.emu_traffic(ctypes.c_void_p(moved.ctypes.data), ctypes.c_void_p(rows.ctypes.data),
                                         ctypes.c_size_t(n_rows))
        read, written, reread = 0, 0, 0
        for (begin, end), moved_here in zip(self.segments, moved, strict=False):
            was_read = self._touched(self.arena.read, begin, end)
            read += int(np.count_nonzero(was_read))
            written += int(np.count_nonzero(self._touched(self.arena.written, begin, end)))
            if end - begin < SMALL_BYTES:
                sectors = np.unique((np.flatnonzero(was_read) + begin) // 32)
                reread += int(moved_here) - 32 * len(sectors)
        table = {}
        for offset, is_shared, *counts in rows.tolist():
            key = offset, is_shared
            table[key] = tuple(a + b for a, b in zip(table.get(key, (0,) * 4), counts, strict=True))
        rows = tuple((*key, *counts) for key, counts in sorted(table.items()))
        moved, conflicts = sum(row[4] for row in rows), sum(row[5] for row in rows)
        return Traffic(read, written, moved, reread, conflicts, self.library, rows)

    @staticmethod
    def _touched(memory, begin, end):
        return np.ctypeslib.as_array((ctypes.c_uint8 * (end - begin)).from_address(memory + begin))

    def describe(self, address):
        """An address in words: "8 bytes past the end of x (4608 bytes)"."""
        if address < 4096:
            return "a null pointer" if not address else f"{address} bytes from a null pointer"
        offset = address - self.arena.bytes
        if not 0 <= offset < 1 << 32 or not self.names:
            return f"address {address:#x}, of no argument"
        i = max(bisect.bisect_right([begin for begin, _ in self.segments], offset) - 1, 0)
        begin, end = self.segments[i]
        if offset >= end and i + 1 < len(self.names) and self.segments[i + 1][0] - offset < offset - end:
            i += 1
            begin, end = self.segments[i]
        if offset < begin:
            return f"{begin - offset} bytes before {self.names[i]} ({end - begin} bytes)"
        if offset >= end:
            return f"{offset - end} bytes past the end of {self.names[i]} ({end - begin} bytes)"
        return f"byte {offset - begin} of {self.names[i]} ({end - begin} bytes)"


def _offset(array):
    """Bytes from the start of the memory that an array is a view of."""
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    return array.ctypes.data - root.ctypes.data


@contextmanager
def watched(library, params, packed, args):
    """A Watch around a launch, which changes its arguments and counts its Traffic only when it ends well."""
    with _lock:
        watch = Watch(library, params, packed, args)
        try:
            watch.fill()
            yield watch
            watch.copy_back()
            watch.counted = watch.traffic()
        finally:
            watch.clear()
