"""What is imported, and when: opening the engine costs NumPy and little else, and no framework ever."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FRAMEWORKS = ("torch", "transformers", "jax", "tensorflow", "triton", "cupy")
NEEDED_LATER = ("tokenizers", "jinja2", "huggingface_hub", "tqdm", "PIL", "safetensors")


def modules_after(code):
    """Top-level modules that a fresh interpreter has after running `code`."""
    code += "\nimport sys\nprint(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


def test_importing_the_engine_imports_numpy_and_no_other_large_library():
    assert not modules_after("import engine") & {*FRAMEWORKS, *NEEDED_LATER}


def test_the_cpu_lane_never_imports_cupy_or_a_framework():
    ran = modules_after("from engine import LLM\n"
                        "LLM('demo/checkpoint', device='cpu').chat([{'role': 'user', 'content': 'Hello!'}])")
    assert "tokenizers" in ran and not ran & set(FRAMEWORKS)


def test_no_file_of_the_engine_names_a_framework():
    for file in [*ROOT.glob("engine/**/*.py"), *ROOT.glob("loaders/*.py")]:
        for line in file.read_text().splitlines():
            words = line.split()
            is_import = words[:1] in (["import"], ["from"])
            assert not (is_import and words[1].split(".")[0] in FRAMEWORKS[:-1]), f"{file}: {line}"


def test_cuda_is_no_package():
    """A cuda/__init__.py would hide NVIDIA's own `cuda` namespace from everything in the process."""
    assert (ROOT / "cuda").is_dir() and not list((ROOT / "cuda").rglob("__init__.py"))
