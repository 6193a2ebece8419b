"""What a figure was measured on: CPU, cores, memory, GPU with its clocks and power, commit, versions."""

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SMI_S = 10.0            # for nvidia-smi
PACKAGES = ("numpy", "ml_dtypes", "cupy", "torch", "triton", "transformers", "flashinfer")
# nvidia-smi's name of a field -> ours. They change while the GPU works, so they are read before and after.
GPU_STATE = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "power.draw": "power_w", "temperature.gpu": "celsius",
             "utilization.gpu": "utilization_percent", "memory.used": "memory_used_mib"}
GPU_LIMITS = {"driver_version": "driver", "clocks.max.sm": "max_sm_mhz", "clocks.max.mem": "max_memory_mhz",
              "power.limit": "power_limit_w", "name": "name", "memory.total": "memory_mib"}


def machine():
    """CPU model, the cores this process may use, memory in bytes, system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu_model(), "cores": cores, "memory_bytes": memory_bytes, "system": platform.platform()}


def cpu_model():
    """As Linux names it, with family and model number where the name says little; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def load_average():
    """Of the last minute, or None where the system keeps none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def gpu(device):
    """Name, SMs, memory, driver and limits of one GPU: what CuPy and nvidia-smi know of it, {} for nothing."""
    facts = gpu_query(device, GPU_LIMITS)
    if "memory_mib" in facts:
        facts["memory_bytes"] = int(facts.pop("memory_mib")) * 2**20
    cupy = sys.modules.get("cupy")
    if cupy is not None:
        properties = _asked(lambda: cupy.cuda.runtime.getDeviceProperties(device)) or {}
        name = properties.get("name")
        known = {"name": name.decode() if isinstance(name, bytes) else name,
                 "n_sms": properties.get("multiProcessorCount"), "memory_bytes": properties.get("totalGlobalMem"),
                 "l2_bytes": properties.get("l2CacheSize"),
                 "compute_capability": _asked(lambda: cupy.cuda.Device(device).compute_capability),
                 "cuda_driver": _asked(lambda: cupy.cuda.runtime.driverGetVersion()),
                 "cuda_runtime": _asked(lambda: cupy.cuda.runtime.runtimeGetVersion())}
        facts.update({key: value for key, value in known.items() if value is not None})
    return facts


def gpu_query(device, fields):
    """{our name: number, or text} as nvidia-smi says it now, without what it does not support; {} where it fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits",
               "-i", _asked(lambda: sys.modules["cupy"].cuda.runtime.deviceGetPCIBusId(device)) or str(device)]
    values = [value.strip() for value in answer_of(command).strip().split(",")]
    if len(values) != len(fields):
        return {}
    try:
        return {name: value if name in ("driver", "name") else float(value)
                for name, value in zip(fields.values(), values, strict=True)
                if not value.startswith("[")}                   # [N/A], [Not Supported]
    except ValueError:
        return {}


def answer_of(command, limit_s=SMI_S):
    """What a program prints, "" where it fails or takes longer. One that a driver which hangs keeps from ending is left
    behind: nothing waits for it."""
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return ""
    try:
        text, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return ""
    return "" if process.returncode else text


def gpu_state(device):
    """Clocks, power and temperature now: the fields of GPU_STATE."""
    return gpu_query(device, GPU_STATE)


def _asked(question):
    """The answer, or None where CuPy is absent or cannot say."""
    try:
        return question()
    except Exception:
        return None


def versions():
    """Python's, and of the packages this process has imported; it imports none."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if isinstance(version, str):
            found[name] = version
    return found


def commit(root=ROOT):
    """The checkout's commit, with "+changes" when files differ from it; None outside git."""
    def git(*arguments):
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True)
    try:
        head = git("rev-parse", "--verify", "--quiet", "HEAD")
        if head.returncode:
            return None
        return head.stdout.strip() + ("+changes" if git("status", "--porcelain").stdout.strip() else "")
    except FileNotFoundError:
        return None
