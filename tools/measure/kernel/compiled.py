"""What each kernel takes of each architecture, compiled without a GPU: ptxas's figures, and how many blocks fit."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules

import engine.kernels
from engine.errors import KernelError
from engine.kernels import device
from engine.kernels.resources import LIMITS, Resources, read_log
from engine.kernels.source import COMMENT
from engine.models.presets import preset

MAX_TOKENS = 8192           # of a step; launchers choose tiles by up to so many rows
LEAST_WARPS = 16            # of an SM's 64, to keep memory busy; layer_norm, which keeps most in registers, has 18
TILE_BYTES = 40 << 10       # of dynamic shared memory: from here on copies to tiles do that, and few warps are enough
# Tiles are made for an SM of an H200; __launch_bounds__(threads, blocks) says how many of them it holds at once.
TILED = ("sm_90a", "sm_100a")
BOUNDS = r"__launch_bounds__\((?:[^(),]|\([^()]*\))*,\s*(\w+)\s*\)\s*%s\s*\("


@dataclass
class Row:
    """One kernel with its constants on one architecture. `taken` is None where it does not compile."""

    file: str
    kernel: str
    arch: str
    n_threads: int
    dynamic_smem_bytes: int
    taken: Resources | None
    error: str = ""
    asked_blocks: int = 1       # of an SM, by the kernel's __launch_bounds__

    @property
    def smem_bytes(self):
        return self.taken.smem_bytes + self.dynamic_smem_bytes

    @property
    def blocks(self):
        """That fit an SM at once."""
        return LIMITS[self.arch].blocks_per_sm(self.taken, self.n_threads, self.dynamic_smem_bytes)

    @property
    def warps(self):
        return self.blocks * -(-self.n_threads // 32)

    @property
    def least_blocks(self):
        """Fewer than so many are a kernel that lost its occupancy."""
        least = self.asked_blocks if self.arch in TILED else 1
        if self.dynamic_smem_bytes >= TILE_BYTES:
            return least
        return max(least, -(-LEAST_WARPS // -(-self.n_threads // 32)))

    def problems(self):
        """What is wrong, in words; nothing for a kernel as it should be."""
        if self.taken is None:
            return ["does not compile"]
        limits = LIMITS[self.arch]
        is_bad = {
            f"spills {self.taken.spill_stores} + {self.taken.spill_loads} bytes":
                self.taken.spill_stores or self.taken.spill_loads,
            f"a local array of {self.taken.stack_bytes} bytes": self.taken.stack_bytes and not self.taken.spill_stores,
            f"{self.smem_bytes} bytes of shared memory, a block has {limits.block_smem_bytes}":
                self.smem_bytes > limits.block_smem_bytes,
            f"{self.n_threads} threads of {self.taken.registers} registers do not fit an SM":
                not self.blocks and self.smem_bytes <= limits.block_smem_bytes}
        return [words for words, holds in is_bad.items() if holds]


def variants(presets, kernels=None, max_tokens=MAX_TOKENS):
    """[(Build, threads, dynamic shared memory)] of everything that the presets launch, each once.

    kernels   module names in engine/kernels, None for all
    """
    specs = [preset(name) for name in presets]
    found = {}
    names = sorted(module.name for module in iter_modules(engine.kernels.__path__))
    for module in (import_module(f"engine.kernels.{name}") for name in names if kernels is None or name in kernels):
        if hasattr(module, "variants"):
            found.update(((build.source.file, repr(build), n_threads, smem), (build, n_threads, smem))
                         for spec in specs for build, n_threads, smem in module.variants(spec, max_tokens))
    return list(found.values())


def asked_blocks(build):
    """The second number of a kernel's __launch_bounds__, 1 where it has none."""
    found = re.search(BOUNDS % build.entry, COMMENT.sub(" ", build.source.text))
    return int(build.constants.get(found[1], found[1])) if found else 1


def check(found, arches, n_workers):
    """A Row for each of `found` on each architecture. Kernels of a file that share constants are compiled as one."""
    def compile_one(key):
        (file, constants), arch = key
        try:
            return read_log(device.build(sources[file], dict(constants), arch).with_suffix(".log").read_text()), ""
        except KernelError as error:
            return None, str(error)

    sources = {build.source.file: build.source for build, *_ in found}
    units = {id(build): (build.source.file, tuple(build.constants.items())) for build, *_ in found}
    keys = [(unit, arch) for unit in dict.fromkeys(units.values()) for arch in arches]
    with ThreadPoolExecutor(n_workers) as pool:             # NVRTC lets other threads run
        compiled = dict(zip(keys, pool.map(compile_one, keys), strict=True))
    rows = []
    for build, n_threads, smem in found:
        n_asked = asked_blocks(build)
        for arch in arches:
            taken, error = compiled[units[id(build)], arch]
            rows.append(Row(build.source.file, repr(build), arch, n_threads, smem, taken and taken[build.entry], error,
                            n_asked))
    return rows
