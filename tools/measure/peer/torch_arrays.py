"""torch beside the engine: the same memory as tensors, work on the lane's own stream, CUDA graphs of it.

torch is imported where a peer runs, so that the rest of the bench needs none.
"""

import sys
from contextlib import contextmanager, nullcontext

import numpy as np
from ml_dtypes import bfloat16

MOST_TEXT = 200     # characters of an error
WARMUPS = 3             # before a capture: compiling, autotuning and cuBLAS's workspaces come with the first calls


def as_torch(array):
    """The array's own memory as a tensor. bfloat16 passes as int16, which both bridges know."""
    import torch
    is_bfloat16 = array.dtype == np.dtype(bfloat16)
    raw = array.view(np.int16) if is_bfloat16 else array
    tensor = torch.from_numpy(raw) if isinstance(raw, np.ndarray) else torch.from_dlpack(raw)
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


def as_numpy(tensor):
    """A copy on the host, float32 where the tensor holds floats."""
    return (tensor.detach().float() if tensor.is_floating_point() else tensor.detach()).cpu().numpy()


@contextmanager
def torch_running(lane):
    """The context in which torch runs on the lane: its stream is current, and nothing is differentiated."""
    import torch
    stream = torch.cuda.stream(stream_of(lane)) if lane.name == "cuda" else nullcontext()
    with lane.running(), stream, torch.no_grad():
        yield


def stream_of(lane):
    """A cuda lane's stream, as torch names it."""
    import torch
    return torch.cuda.ExternalStream(lane.stream.ptr, device=lane.device.id)


def compiled(function, lane):
    """torch.compile at its best setting: autotuned kernels on a GPU, where the caller captures the graph."""
    import torch
    if lane.name == "cuda":
        return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)
    return torch.compile(function, dynamic=False, fullgraph=True)


def captured(launch, lane):
    """(a function that does what launch() does, why it is no CUDA graph or ""); called inside torch_running."""
    if lane.name != "cuda":
        return launch, ""
    import torch
    for _ in range(WARMUPS):
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream_of(lane)):
            launch()
    except Exception as error:          # whatever it is, eagerly it has just run
        return launch, why(error)
    return graph.replay, ""


def why(error):
    """One line of an error: torch's go on for pages."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[:MOST_TEXT]}"


def forget_compiled():
    """Drops what torch.compile keeps, and gives its memory back."""
    import torch
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_loaded():
    return "torch" in sys.modules
