"""What a GPU report consists of: the parts in order of weight, at the sizes of released models or at toy sizes."""

import os
from importlib.util import find_spec

from engine.trace import OPS
from measure.report import BenchError
from measure.runs.parts import Part

ROOM_BYTES = 8 << 30        # beside the weights of a model that is to fit: KV cache, workspace, the context
WEIGHT_BYTES = 2            # bfloat16
DECODE = "decode={1,8,64}*1@1024"
# Other families: (part, preset, how many layers, the first that fit; None for all, further arguments, seconds: least,
# most, for all of it). Eight layers of Scout, two of them without RoPE, fit 80 GB with room for the cache.
FAMILIES = (("engine-26b-a4b", "gemma-4-26b-a4b", (None,), (), (35, 90, 55)),
            ("engine-e4b", "gemma-4-e4b", (None,), (), (15, 60, 30)),
            ("engine-scout-slice", "llama-4-scout", (8, 4), (), (25, 70, 45)),
            ("engine-e4b-host", "gemma-4-e4b", (None,), ("--ple", "host"), (15, 60, 30)))
# With a draft model of random weights, whose drafts are made to hold: (part, arguments, seconds as above).
DRAFTS = (("31b-slice", ("--preset", "gemma-4-31b", "--layers", "12"), (20, 75, 50)),
          ("e4b", ("--preset", "gemma-4-e4b"), (15, 60, 40)))
EXPERTS = "moe_route,moe_gated_linear,moe_linear,moe_combine"
DEMO = ("--model", "demo/checkpoint")
DRAFTED = ("--model", "tests/goldens/gemma4-assistant/checkpoint", "--draft",
           "tests/goldens/gemma4-assistant/assistant")
# Besides tests/kernels, what --lane cuda takes to the GPU.
ENGINE_TESTS = tuple(f"tests/test_{name}.py" for name in ("lanes", "same_bits", "lanes_vision", "speculative_lanes",
                                                          "expert_choices", "explain", "media_steps"))
# Of tests in processes side by side, and BLAS threads of each, or they would wait for each other.
MOST_WORKERS, THREADS = 8, "2"
# Of processes of pytest-xdist, where each crash ends one test for good: any number, the part's time is the limit.
MOST_RESTARTS = 1_000_000
# A kernel that faults ends its process's use of the GPU: the ops that share one. The last group is all others.
KERNEL_GROUPS = {"products": "linear,gated_linear", "attention": "attention"}
KERNEL_GROUPS["others"] = ",".join(sorted(set(OPS) - set(",".join(KERNEL_GROUPS.values()).split(","))))
# Tests that take a second, kernels among them, to see that the part works.
QUICK_TESTS = ("tests/test_random.py", "tests/kernels/test_rmsnorm.py")


def bench(name, command, lane, *arguments, least_s, most_s, uses_ceilings=True, why_not="", **fields):
    """A Part that is a command of tools/bench.py."""
    if command == "against" and find_spec("torch") is None:
        why_not = why_not or "torch is not installed"
    argv = ("tools/bench.py", command, "--lane", lane, "--json", "{out}", *(("{ceilings}",) if uses_ceilings else ()))
    return Part(name, (*argv, *arguments), least_s, most_s, why_not=why_not, **fields)


def tests(name, lane, *arguments, least_s, most_s, dist):
    """A Part that is a run of pytest. One that hangs prints nothing but, after 20 s, where it is; then the run ends.

    dist  how tests are dealt to processes side by side, where pytest-xdist is installed: "load" one by one, and where a
          kernel's fault ends a process's use of the GPU, a new process goes on (tests/conftest.py); "loadfile" whole
          files, where one that crashes begins again, so that pytest-xdist's own limit of restarts holds. Without
          pytest-xdist all tests behind such a fault fail.
    """
    workers, env, stall_s = (), (), 40
    if find_spec("xdist") is not None:
        workers = "-n", str(max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2))), "--dist", dist
        env = tuple((f"{library}_NUM_THREADS", THREADS) for library in ("OMP", "OPENBLAS", "MKL"))
        workers += ("--max-worker-restart", str(MOST_RESTARTS)) if dist == "load" else ()
        stall_s = 60                                    # of the last file: the others have nothing to print any more
    argv = ("-m", "pytest", "-v", "--tb=short", "-o", "faulthandler_timeout=20", "-p", "no:cacheprovider",
            "--junit-xml", "{out}", "--lane", lane, *workers, *arguments)
    return Part(name, argv, least_s, most_s, stall_s=stall_s, suite=True, env=env)


def full_parts(lane, memory_bytes):
    """The parts of a report on a GPU with so much memory."""
    few = ("--n-tokens", "1,64", "--context", "1024", "--batch", "1,8", "--repeats", "5")
    no_ops = ("--no-ops", "--repeats", "5")
    with_ops = ("--repeats", "3", "--steps", "8")       # where a step's time goes is what these two are for
    parts = [
        bench("ceilings", "ceilings", lane, least_s=20, most_s=60, uses_ceilings=False),
        tests("tests-kernels", lane, "tests/kernels", least_s=45, most_s=100, dist="load"),
        tests("tests-engine", lane, *ENGINE_TESTS, least_s=30, most_s=90, dist="load"),
        *(bench(f"kernels-31b-{what}", "kernels", lane, "--preset", "gemma-4-31b", "--op", ops, least_s=10, most_s=50,
                full_s=25, short=few) for what, ops in KERNEL_GROUPS.items()),
        *(bench(f"kernels-experts-{what}", "kernels", lane, "--preset", name, "--op", EXPERTS, least_s=10, most_s=40,
                full_s=20, short=few) for what, name in (("26b-a4b", "gemma-4-26b-a4b"), ("scout", "llama-4-scout"))),
        bench("kernels-1b", "kernels", lane, "--preset", "gemma-3-1b", least_s=10, most_s=60, full_s=30, short=few),
        bench("engine-1b", "engine", lane, "--preset", "gemma-3-1b", "--case", DECODE, "--case", "prefill=2048",
              least_s=15, most_s=60, full_s=30, short=with_ops),
        bench("engine-31b-slice", "engine", lane, "--preset", "gemma-4-31b", "--layers", "12", "--case", DECODE,
              "--case", "decode=1*1@32768", "--case", "prefill=8192", "--case", "mix=2048,16*1@4096", least_s=20,
              most_s=90, full_s=55, short=with_ops),
        bench("engine-31b", "engine", lane, "--preset", "gemma-4-31b", "--case", "decode={1,8}*1@1024", "--case",
              "prefill=2048", least_s=45, most_s=100, full_s=70, short=no_ops,
              why_not=too_large("gemma-4-31b", memory_bytes))]
    parts += [bench(f"drafts-{name}", "engine", lane, *of, "--n-draft-tokens", "2,4,8", "--acceptance", "0.6,1",
                    "--case", "decode={1,8}*1@1024", "--case", "verify=16*5@4096", "--steps", "16", "--repeats", "5",
                    least_s=least_s, most_s=most_s, full_s=full_s, short=("--no-ops", "--repeats", "2"))
              for name, of, (least_s, most_s, full_s) in DRAFTS]
    for name, preset_name, sizes, more, (least_s, most_s, full_s) in FAMILIES:
        n_layers = next((n for n in sizes if not too_large(preset_name, memory_bytes, n)), sizes[-1])
        layers = ("--layers", str(n_layers)) if n_layers else ()
        parts.append(bench(name, "engine", lane, "--preset", preset_name, *layers, *more, "--case",
                           "decode={1,8}*1@1024", "--case", "prefill=2048", least_s=least_s, most_s=most_s,
                           full_s=full_s, short=no_ops, why_not=too_large(preset_name, memory_bytes, n_layers)))
    # Peers that compile take 10 s and more a shape, and the tests that use no GPU say the least of one: they come last.
    # The least of all but the spare ones fits the time together.
    return [*parts,
            bench("against-kernels", "against", lane, "--preset", "gemma-4-31b", "--peer", "torch,sdpa,flashinfer",
                  "--op", "linear,gated_linear,attention,sample", least_s=15, most_s=60, full_s=35,
                  short=("--n-tokens", "1,64", "--batch", "8", "--repeats", "5")),
            bench("against-experts", "against", lane, "--preset", "gemma-4-26b-a4b", "--peer", "torch,triton",
                  "--op", "moe_gated_linear,moe_linear", least_s=10, most_s=60, full_s=45,
                  short=("--n-tokens", "1,64", "--repeats", "5")),
            bench("serve", "serve", lane, "--preset", "gemma-3-1b", "--requests", "64", "--rate", "32,inf", "--output",
                  "64", least_s=10, most_s=40, uses_ceilings=False),
            bench("load", "load", lane, "--preset", "gemma-3-1b", "--folder", "{scratch}", "--repeats", "2",
                  least_s=20, most_s=60, uses_ceilings=False),
            bench("against-model", "against", lane, "--preset", "gemma-4-31b", "--layers", "6", "--peer",
                  "torch,compiled,transformers", "--case", "decode={1,8}*1@1024", "--case", "prefill=2048",
                  least_s=30, most_s=180),
            tests("tests-others", lane, "tests", "--ignore=tests/kernels",
                  *(f"--ignore={file}" for file in ENGINE_TESTS), least_s=50, most_s=200, dist="loadfile"),
            bench("against-compiled", "against", lane, "--preset", "gemma-4-31b", "--peer", "compiled,flex", "--op",
                  "gated_linear,attention,add_norm", "--n-tokens", "1,4096", "--batch", "8", least_s=20, most_s=150,
                  spare=True),
            bench("against-transformers", "against", lane, "--preset", "gemma-4-26b-a4b", "--layers", "6", "--peer",
                  "transformers", "--case", "decode=1*1@1024", "--case", "prefill=2048", least_s=30, most_s=120,
                  spare=True, why_not="" if find_spec("transformers") else "transformers is not installed")]


def quick_parts(lane):
    """The same flow in half a minute, without a GPU: toy sizes, a model of the checkout."""
    no_clock = "the emulated lane has no clock" if lane == "emulated" else ""
    cases = ("--case", "decode=2*1@24", "--case", "prefill=24")
    test_lane = lane if lane.startswith("cuda") else "emulated"
    return [
        bench("ceilings", "ceilings", lane, "--bytes", str(1 << 24), "--size", "256", "--repeats", "2", least_s=2,
              most_s=30, uses_ceilings=False, why_not=no_clock),
        tests("tests", test_lane, *QUICK_TESTS, least_s=2, most_s=60, dist="load"),
        bench("kernels", "kernels", lane, "--preset", "gemma-3-270m", "--op", "rms_norm", "--n-tokens", "2",
              "--repeats", "2", least_s=2, most_s=60),
        bench("engine", "engine", lane, *DEMO, *cases, "--repeats", "2", least_s=2, most_s=60),
        bench("against", "against", lane, "--peer", "torch", "--preset", "gemma-3-270m", "--op", "rms_norm",
              "--n-tokens", "2", "--repeats", "2", least_s=2, most_s=60, why_not=no_clock),
        bench("drafts", "engine", lane, *DRAFTED, *cases[:2], "--n-draft-tokens", "2", "--acceptance", "1", "--steps",
              "6", "--repeats", "2", "--no-ops", least_s=2, most_s=60),
        bench("serve", "serve", lane, *DEMO, "--requests", "6", "--rate", "50,inf", "--input", "12", "--output", "4",
              least_s=2, most_s=60, uses_ceilings=False, why_not=no_clock),
        bench("load", "load", lane, *DEMO, "--repeats", "1", least_s=2, most_s=60, uses_ceilings=False,
              why_not=no_clock)]


def too_large(preset_name, memory_bytes, n_layers=None):
    """Why a preset, or its first layers, does not fit a GPU with so much memory; "" where it does."""
    from engine.tensors import n_weights
    from measure.models import text_of
    from measure.random_weights import slice_of
    _, spec = text_of(preset_name)
    if n_layers:
        spec = slice_of(spec, n_layers)
    need = n_weights(spec) * WEIGHT_BYTES + ROOM_BYTES
    if need <= memory_bytes:
        return ""
    return f"it wants {need / 2**30:.0f} GiB, the GPU has {memory_bytes / 2**30:.0f}"


def chosen(parts, only, skip):
    """The parts that are asked for. A name stands for the part of that name and for those it begins: engine for
    engine-1b. Raises BenchError for a name of none."""
    def fits(part, name):
        return part.name == name or part.name.startswith(f"{name}-")
    for name in [*only, *skip]:
        if not any(fits(part, name) for part in parts):
            raise BenchError(f"no part {name!r}, expected some of {', '.join(part.name for part in parts)}")
    return [part for part in parts if (not only or any(fits(part, name) for name in only))
            and not any(fits(part, name) for name in skip)]
