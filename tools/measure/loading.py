"""One way of loading a checkpoint, once, in a process of its own, so that imports and peak memory are its own.

    python tools/measure/loading.py SIDE '{"path": ..., "lane": ...}'

Prints one line of JSON: seconds, bytes and versions, or {"error": ...}.
"""

import json
import os
import resource
import sys
import time
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
PINNED_BYTES, PINNED_COPIES = 1 << 28, 20
MAX_SEQ_LEN = 256           # a small KV cache: loading is asked about


def memory(key):
    """Bytes of this process by /proc/self/status: VmHWM is the most held, VmRSS what is held; elsewhere the most."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rawgem(path, lane):
    """The engine: import, lane, Core.open. `weights_s` is the part of open_s that reads weights."""
    began = time.perf_counter()
    from engine.backend import open_lane
    from engine.config import EngineConfig
    from engine.core import Core
    from engine.models import describe
    from loaders.config import Config
    from loaders.safetensors import Checkpoint
    imported = time.perf_counter()
    spec = describe(Config.load(path))
    opened_lane = open_lane(lane, "auto")
    config = EngineConfig(device=lane, max_seqs=1, max_seq_len=min(MAX_SEQ_LEN, spec.max_positions))
    before, ready, span = memory("VmRSS"), time.perf_counter(), []

    @contextmanager
    def bar(n_bytes):
        span.append(time.perf_counter())
        yield SimpleNamespace(update=lambda n_bytes: None)
        span.append(time.perf_counter())

    with Checkpoint.open(path) as checkpoint:
        core = Core.open(spec, config, opened_lane, checkpoint, bar)
    opened = time.perf_counter()
    on_host = 0 if opened_lane.name == "cuda" else core.plan.weights_bytes
    return {"import_s": imported - began, "lane_s": ready - imported, "open_s": opened - ready,
            "weights_s": span[1] - span[0], "n_bytes": checkpoint.n_bytes, "extra_bytes": _extra(before, on_host),
            "largest_bytes": max(tensor.n_bytes for tensor in checkpoint.tensors.values())}


def safetensors_numpy(path, lane):
    """safetensors' own reader, file by file, then the arrays as the lane has them: float32 on cpu, on the GPU on
    cuda."""
    began = time.perf_counter()
    import ml_dtypes  # noqa: F401  or its reader knows no bfloat16
    import numpy as np
    from safetensors.numpy import load_file
    cupy = None
    if lane != "cpu":
        import cupy
        cupy.cuda.Device(int(lane.partition(":")[2] or 0)).use()
        cupy.empty(1)                                       # the context is there before the clock starts
    imported, before = time.perf_counter(), memory("VmRSS")
    arrays, n_bytes = [], 0
    for file in shards(path):
        for array in load_file(file).values():
            n_bytes += array.nbytes
            arrays.append(array.astype(np.float32) if cupy is None else cupy.asarray(array))
    if cupy is not None:
        cupy.cuda.Device().synchronize()
    loaded = time.perf_counter()
    on_host = sum(array.nbytes for array in arrays) if cupy is None else 0
    return {"import_s": imported - began, "weights_s": loaded - imported, "n_bytes": n_bytes,
            "extra_bytes": _extra(before, on_host)}


def safetensors_torch(path, lane):
    """safetensors' own reader for torch, straight to the GPU."""
    began = time.perf_counter()
    import torch
    from safetensors.torch import load_file
    torch.empty(1, device=lane)
    imported, before = time.perf_counter(), memory("VmRSS")
    tensors = [tensor for file in shards(path) for tensor in load_file(file, device=lane).values()]
    torch.cuda.synchronize()
    loaded = time.perf_counter()
    return {"import_s": imported - began, "weights_s": loaded - imported,
            "n_bytes": sum(tensor.nbytes for tensor in tensors), "extra_bytes": _extra(before, 0)}


def pinned(path, lane):
    """The limit: copies from pinned memory to the GPU, back to back."""
    import cupy
    with cupy.cuda.Device(int(lane.partition(":")[2] or 0)), cupy.cuda.Stream(non_blocking=True) as stream:
        host = cupy.cuda.alloc_pinned_memory(PINNED_BYTES)
        array = cupy.empty(PINNED_BYTES, "uint8")
        for n in (1, PINNED_COPIES):                        # the first is not counted
            began = time.perf_counter()
            for _ in range(n):
                array.data.copy_from_host_async(host.ptr, PINNED_BYTES, stream)
            stream.synchronize()
        return {"bytes_per_s": n * PINNED_BYTES / (time.perf_counter() - began)}


SIDES = {"rawgem": rawgem, "safetensors.numpy": safetensors_numpy, "safetensors.torch": safetensors_torch,
         "pinned copies": pinned}


def shards(path):
    return sorted(Path(path).glob("*.safetensors"))


def _extra(before, on_host):
    """Host memory that loading took at its peak beyond what it leaves there."""
    return max(0, memory("VmHWM") - before - on_host)


def main():
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                       # what a library prints must not land in the answer
    sys.path[0] = str(ROOT)             # not this folder, which has an engine.py of its own
    try:
        found = SIDES[sys.argv[1]](**json.loads(sys.argv[2]))
        names = {name: next((v for v in map(_version, packages) if v), None)
                 for name, packages in {"numpy": ["numpy"], "safetensors": ["safetensors"], "torch": ["torch"],
                                        "cupy": ["cupy-cuda12x", "cupy-cuda13x", "cupy"]}.items()
                 if name in sys.modules}
        found |= {"peak_bytes": memory("VmHWM"), "versions": names}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), file=answer, flush=True)


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
