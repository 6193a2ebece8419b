"""README says only what runs: its Python example is executed as pasted, its commands exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run(section, monkeypatch, capsys):
    """What the example of a section prints, executed as pasted."""
    monkeypatch.chdir(ROOT)
    text = README.split("## " + section)[1].split("\n## ")[0]
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ") or not line)
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out


def test_the_python_example_runs_as_pasted(monkeypatch, capsys):
    out = run("From Python", monkeypatch, capsys)
    assert "A rabbit eats carrots." in out and "longest sequence 1024 tokens" in out


def test_the_example_with_pictures_runs_as_pasted(monkeypatch, capsys):
    assert "'lookups': " in run("Pictures and video", monkeypatch, capsys)


def test_the_example_with_a_draft_runs_as_pasted(monkeypatch, capsys):
    out = run("Speculative decoding", monkeypatch, capsys)
    assert "'tokens_per_check': " in out and "tokens a check" in out


def test_the_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile


def test_every_file_it_names_is_there():
    for name in re.findall(r"`((?:engine|loaders|tools|cuda|demo|tests|benchmarks)/[\w./-]*)`", README):
        assert (ROOT / name).exists(), name
