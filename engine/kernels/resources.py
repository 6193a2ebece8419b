"""What a compiled kernel takes of a GPU: ptxas's figures, the limits of each architecture, and how many blocks fit."""

import re
from dataclasses import dataclass

ENTRY = re.compile(r"Compiling entry function '(\w+)'")
FUNCTION = re.compile(r"Function properties for (\w+)")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SMEM = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Resources:
    """Of one kernel, as `ptxas -v` has them.

    registers                  of a thread
    stack_bytes                of a thread: memory it addresses by a computed index, or spills to
    spill_stores, spill_loads  bytes
    smem_bytes                 static shared memory of a block
    """

    registers: int
    stack_bytes: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    smem_bytes: int = 0


def read_log(log):
    """{entry: Resources} of a ptxas log. What a function that was not inlined takes counts for every entry of it."""
    registers, smem, memory, function = {}, {}, {}, None
    for line in log.splitlines():
        if found := FUNCTION.search(line):
            function = found[1]
        elif found := ENTRY.search(line):
            registers[found[1]] = smem[found[1]] = 0
        elif found := MEMORY.search(line):
            memory[function] = [int(n) for n in found.groups()]
        elif found := REGISTERS.search(line):
            registers[function] = int(found[1])
            smem[function] = int(static[1]) if (static := SMEM.search(line)) else 0
    called = [memory[name] for name in memory if name not in registers]
    return {entry: Resources(registers[entry], *map(sum, zip(memory[entry], *called, strict=True)), smem[entry])
            for entry in registers}


@dataclass(frozen=True)
class Limits:
    """Of a streaming multiprocessor (SM). Source: CUDA C++ Programming Guide, technical specifications by compute
    capability; allocation units: cuda_occupancy.h. A block's warps are spread over four register files."""

    block_smem_bytes: int           # of a block that asks for it
    smem_bytes: int
    reserved_smem_bytes: int = 1024     # the system's own, in every block
    smem_unit: int = 128
    registers: int = 65536
    register_unit: int = 256        # a warp's are allocated in
    threads: int = 2048
    block_threads: int = 1024
    blocks: int = 32

    def blocks_per_sm(self, taken, n_threads, dynamic_smem_bytes):
        """How many blocks of n_threads fit an SM at once; 0 is a launch that fails."""
        warps = -(-n_threads // 32)
        registers_of_warp = _round_up(max(taken.registers, 1) * 32, self.register_unit)
        smem = taken.smem_bytes + dynamic_smem_bytes
        if n_threads > self.block_threads or smem > self.block_smem_bytes:
            return 0
        return min(self.blocks, self.threads // 32 // warps,
                   self.registers // 4 // registers_of_warp * 4 // warps,
                   self.smem_bytes // _round_up(smem + self.reserved_smem_bytes, self.smem_unit))


def _round_up(n, unit):
    return -(-n // unit) * unit


LIMITS = {"sm_80": Limits(163 << 10, 164 << 10), "sm_90a": Limits(227 << 10, 228 << 10),
          "sm_100a": Limits(227 << 10, 228 << 10)}
