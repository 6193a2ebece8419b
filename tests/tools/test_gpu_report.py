"""tools/gpu_report.py: its arguments, the command end to end, and one that is stopped."""

import signal
import subprocess
import sys

import gpu_report
import pytest
from measure.report import check_document, load_document, rows_of

from tests.tools.part_runs import ROOT, script


def test_a_long_reason_makes_no_line_longer_but_its_own():
    parts = [{"name": "good", "status": "ok", "seconds": 3.2, "why": ""},
             {"name": "wrong", "status": "failed", "seconds": 41.0, "why": "x" * 300}]
    assert gpu_report.part_lines(parts).splitlines() == [
        "part   status   s", "good       ok   3", "wrong  failed  41  " + "x" * 300]


@pytest.mark.parametrize("name, text", [("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("cpu", "cpu")])
def test_names_of_gpus_as_folders(name, text):
    assert gpu_report.slug(name) == text


@pytest.mark.parametrize("commit, text", [("f3c498444efd", "f3c4984"), ("f3c498444efd+changes", "f3c4984-changes"),
                                          (None, "no-commit"), ("a b/c", "a-b-c")])
def test_commits_as_file_names(commit, text):
    assert gpu_report.short_commit(commit) == text


@pytest.mark.parametrize("arguments, message", [
    (["--lane", "cpu"], "--lane cpu goes with --quick"),
    (["--lane", "tpu"], "no lane 'tpu'"),
    (["--lane", "cpu", "--quick", "--limit", "0"], "--limit 0.0 is no time"),
    (["--lane", "cpu", "--quick", "--only", "nothing"], "no part 'nothing'"),
])
def test_bad_arguments_are_named(arguments, message, capsys):
    assert gpu_report.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_the_engine_says_why(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_report, "PROBE", "raise SystemExit('there is no GPU at ' + {lane!r})")
    assert gpu_report.main(["--out", str(tmp_path)]) == 2
    assert "the engine cannot open cuda (exit status 1): there is no GPU at cuda; " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- the command

def test_the_command_end_to_end_on_the_cpu_lane(tmp_path, capsys):
    status = gpu_report.main(["--lane", "cpu", "--quick", "--only", "ceilings,serve", "--out", str(tmp_path / "out"),
                              "--commit", "abcdef0123"])
    text = capsys.readouterr().out
    assert status == 0, text
    [path] = (tmp_path / "out").glob("*.json")
    assert path.name.endswith("-abcdef0.json") and str(path) in text
    found = load_document(path)
    assert {row.section for row in rows_of(found)} == {"ceilings", "serve"}
    assert found["commit"] == "abcdef0123" and found["incomplete"] is None
    assert [one["status"] for one in found["facts"]["parts"]] == ["ok", "ok"]
    assert found["facts"]["packages"]["numpy"] and found["facts"]["ceilings"]["source"] == "measured"
    markdown = path.with_suffix(".md").read_text()
    assert "### serve" in markdown and "| ceilings | ok |" in markdown
    assert sorted(one.suffix for one in (tmp_path / "out").iterdir()) == [".json", ".md"]


def test_a_stopped_command_still_writes(tmp_path):
    """SIGTERM while a part sleeps: the report of what came before is there, and nothing keeps running."""
    code = ("import sys, gpu_report\nfrom measure.runs.parts import Part\n"
            f"first = Part('first', {script(tmp_path, 'first', '')!r}, 1, 100)\n"
            "sleeping = Part('sleeping', ('-c', 'import time; print(1, flush=True); time.sleep(600)'), 1, 600)\n"
            "gpu_report.quick_parts = lambda lane: [first, sleeping]\n"
            f"sys.exit(gpu_report.main(['--lane', 'cpu', '--quick', '--out', {str(tmp_path / 'out')!r}]))")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "tools", stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("sleeping: at most"):
                break
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(60) == 1
    [path] = (tmp_path / "out").glob("*.json")
    found = load_document(path)
    check_document(found)
    assert found["incomplete"] == "interrupted"
    assert [(one["name"], one["status"]) for one in found["facts"]["parts"]] == [("first", "ok"),
                                                                                 ("sleeping", "interrupted")]
    assert [row.name for row in rows_of(found)] == ["first"]
