"""What each kernel takes of each architecture, compiled without a GPU: ptxas's figures, and how many blocks fit."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules

import engine.kernels
from engine.errors import KernelError
from engine.kernels import device
from engine.kernels.resources import LIMITS, Resources, read_log
from engine.models.presets import preset

MAX_TOKENS = 8192           # of a step; launchers choose tiles by up to so many rows


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
        for arch in arches:
            taken, error = compiled[units[id(build)], arch]
            rows.append(Row(build.source.file, repr(build), arch, n_threads, smem, taken and taken[build.entry], error))
    return rows
