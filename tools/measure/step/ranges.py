"""NVTX ranges around steps, layers and ops, for a profiler that shows them (`nsys profile`, `ncu --nvtx`)."""

from contextlib import ExitStack, contextmanager
from importlib import import_module

from measure.report import BenchError
from measure.step.timeline import watched


def markers():
    """(push(text), pop()) of the package nvtx, else of CuPy. Raises BenchError where there is neither."""
    for name, push, pop in (("nvtx", "push_range", "pop_range"), ("cupy.cuda.nvtx", "RangePush", "RangePop")):
        try:
            module = import_module(name)
        except ImportError:
            continue
        return getattr(module, push), getattr(module, pop)
    raise BenchError("--nvtx needs the package nvtx or CuPy, and neither imports; `pip install nvtx` brings it")


@contextmanager
def marked(core):
    """Within it the core's steps are ranges "step", "layer 3", "linear", one inside the other. Its graphs are off: what
    is replayed has no ranges."""
    push, pop = markers()

    @contextmanager
    def span(text, *_):
        push(text)
        try:
            yield
        finally:
            pop()

    step, layers = core.step, core.step.layers
    run, run_layers = step.run, layers.run

    def run_step(batch):
        with span("step"):
            return run(batch)

    def run_marked(batch, observe=None):
        with ExitStack() as layer:
            def mark(j, residual):
                layer.close()                               # of the layer before
                if j < len(core.spec.layers):
                    layer.enter_context(span(f"layer {j}"))
                if observe:
                    observe(j, residual)
            return run_layers(batch, mark)

    step.run, layers.run = run_step, run_marked
    try:
        with watched(core, span):
            yield
    finally:
        del step.run, layers.run                            # the classes' own again
