"""Compiles every kernel that the presets launch for every architecture, with no GPU, and shows what each takes of one.

    python tools/check_kernels.py [--arch sm_90a] [--preset gemma-3-1b] [--kernel attention] [--json]

Registers, stack, spills and static shared memory are ptxas's figures, dynamic shared memory and threads the launcher's
own. A kernel that spills, that keeps a local array in memory, or that does not fit an SM fails: exit status 1.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine.kernels
from engine.errors import ConfigError, KernelError
from engine.kernels import device
from engine.kernels.resources import LIMITS, Resources, read_log
from engine.models.presets import PRESETS, preset

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


def table(rows):
    """Lines of text: one for each kernel, one below it for each architecture."""
    yield " " * 12 + "regs  stack    spills  static  dynamic of limit threads blocks/SM warps/SM"
    last = None
    for row in rows:
        if (row.file, row.kernel) != last:
            yield f"{row.file}: {row.kernel}"
            last = row.file, row.kernel
        if row.taken is None:
            yield f"  {row.arch:8} does not compile"
            continue
        taken, limit = row.taken, LIMITS[row.arch].block_smem_bytes
        yield (f"  {row.arch:8}  {taken.registers:4} {taken.stack_bytes:6} "
               f"{f'{taken.spill_stores}/{taken.spill_loads}':>9} {taken.smem_bytes:7} {row.dynamic_smem_bytes:8} "
               f"{row.smem_bytes / limit:8.0%} {row.n_threads:7} {row.blocks:9} {row.warps:8}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=LIMITS, default=list(LIMITS), help="architectures; all by default")
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS), help="models; all by default")
    parser.add_argument("--kernel", nargs="+", help="launcher modules, like attention; all by default")
    parser.add_argument("--json", action="store_true", help="the rows as JSON")
    args = parser.parse_args(argv)
    try:
        device.nvrtc()
    except ConfigError as error:
        parser.exit(2, f"{error}\n")
    began = time.perf_counter()
    found = variants(args.preset, args.kernel)
    if not found:
        parser.error(f"--kernel {' '.join(args.kernel)}: none of that name in engine/kernels")
    rows = check(found, args.arch, os.cpu_count() or 1)
    bad = [row for row in rows if row.problems()]
    if args.json:
        print(json.dumps([{**asdict(row), "blocks_per_sm": row.taken and row.blocks, "problems": row.problems()}
                          for row in rows], indent=1))
    else:
        print(*table(rows), sep="\n")
        print(f"\n{len(found)} kernels with their constants on {', '.join(args.arch)}, "
              f"{time.perf_counter() - began:.0f} s")
    for row in bad:
        print(f"FAILED {row.file}: {row.kernel} on {row.arch}: {'; '.join(row.problems())}", row.error, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
