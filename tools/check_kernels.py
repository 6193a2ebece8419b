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
from dataclasses import asdict
from itertools import chain
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from measure.cases import one_of
from measure.kernel.compiled import Row, check, variants

from engine.errors import ConfigError
from engine.kernels import device
from engine.kernels.resources import LIMITS
from engine.models.presets import PRESETS

__all__ = ["Row", "check", "main", "table", "variants"]


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
    for name, known, what in (("arch", LIMITS, "architectures"), ("preset", PRESETS, "models")):
        parser.add_argument(f"--{name}", nargs="+", type=one_of(*known), default=[list(known)], metavar="A,B",
                            help=f"{what}, of {', '.join(known)}; all by default")
    parser.add_argument("--kernel", nargs="+", type=lambda text: text.split(","), metavar="A,B",
                        help="launcher modules, like attention; all by default")
    parser.add_argument("--json", action="store_true", help="the rows as JSON")
    args = parser.parse_args(argv)
    arches, presets, kernels = (lists and list(chain(*lists)) for lists in (args.arch, args.preset, args.kernel))
    try:
        device.nvrtc()
    except ConfigError as error:
        parser.exit(2, f"{error}\n")
    began = time.perf_counter()
    found = variants(presets, kernels)
    if not found:
        parser.error(f"--kernel {' '.join(kernels)}: none of that name in engine/kernels")
    rows = check(found, arches, os.cpu_count() or 1)
    bad = [row for row in rows if row.problems()]
    if args.json:
        print(json.dumps([{**asdict(row), "blocks_per_sm": row.taken and row.blocks, "problems": row.problems()}
                          for row in rows], indent=1))
    else:
        print(*table(rows), sep="\n")
        print(f"\n{len(found)} kernels with their constants on {', '.join(arches)}, "
              f"{time.perf_counter() - began:.0f} s")
    for row in bad:
        print(f"FAILED {row.file}: {row.kernel} on {row.arch}: {'; '.join(row.problems())}", row.error, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
