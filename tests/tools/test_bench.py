"""tools/bench.py: its commands and options, what it refuses, and that a run is written however it ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import bench
import pytest
from measure import tables
from measure.cases import parse_cases
from measure.report import BenchError, Goal, Row, Stat, load_document

from engine.errors import ConfigError

BENCH = Path(bench.__file__)


@pytest.fixture
def fake(monkeypatch):
    """bench.py kernels, replaced: `fake.measures(args, report)` is what it does."""
    module = ModuleType("measure.kernels", "What a kernel takes.")
    module.seen = []

    def add_arguments(parser):
        parser.add_argument("--case", type=parse_cases, action="extend")
        parser.set_defaults(repeats=3)

    def run(args, report):
        module.seen.append(args)
        report.add(Row("kernels", "linear", {"lane": args.lane}, {"time": Stat("s", [1e-3] * args.repeats, "lower")}))
        return module.measures(args, report)
    module.add_arguments, module.run, module.measures = add_arguments, run, lambda args, report: 0
    monkeypatch.setitem(sys.modules, "measure.kernels", module)
    return module


def test_common_options_reach_the_command(fake, tmp_path, capsys):
    path = tmp_path / "out.json"
    status = bench.main(["kernels", "--lane", "emulated", "--preset", "gemma-3-1b,gemma-4-31b", "--seed", "7",
                         "--case", "decode={1,2}*1@8", "--case", "prefill=4", "--json", str(path),
                         "--bandwidth", "4.3e12", "--flops", "790e12",
                         "--metadata", "place=desk", "--metadata", "note=a=b"])
    args, = fake.seen
    assert status == 0
    assert (args.lane, args.preset, args.seed, args.repeats) == ("emulated", ["gemma-3-1b", "gemma-4-31b"], 7, 3)
    assert (args.bandwidth, args.flops, args.ceilings) == (4.3e12, 790e12, None)
    assert list(map(str, args.case)) == ["decode=1@8", "decode=2*1@8", "prefill=4"]
    document = json.loads(path.read_text())
    assert document["command"].startswith("python tools/bench.py kernels --lane emulated")
    assert "--case 'decode={1,2}*1@8'" in document["command"]
    assert document["metadata"] == {"place": "desk", "note": "a=b"}
    assert document["settings"]["case"] == ["decode=1@8", "decode=2*1@8", "prefill=4"]
    assert document["settings"]["lane"] == "emulated" and "json" not in document["settings"]
    assert len(document["rows"][0]["stats"]["time"]["samples"]) == 3
    assert capsys.readouterr().out == tables.text(document) + "\n"


def test_the_lane_is_the_gpu_where_there_is_one(fake, gpu, capsys):
    assert bench.main(["kernels"]) == 0
    assert fake.seen[0].lane == "cuda"
    assert "\ngpu: " in capsys.readouterr().out


def test_the_lane_is_the_cpu_elsewhere(fake, monkeypatch, capsys):
    monkeypatch.setattr("engine.cuda_lane.gpu_is_present", lambda: False)
    assert bench.main(["kernels", "-r", "1"]) == 0
    assert (fake.seen[0].lane, fake.seen[0].repeats) == ("cpu", 1)
    assert "\ngpu: " not in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    ([], "the following arguments are required: COMMAND"),
    (["engines"], "invalid choice: 'engines'"),
    (["kernels", "--preset", "gemma-3-1b,gemma-9"], "no preset 'gemma-9', expected some of gemma-3-270m,gemma-3-1b"),
    (["kernels", "--lane", "tpu"], "no lane 'tpu', expected cpu, emulated, cuda or cuda:N"),
    (["kernels", "--lane", "cpu:1"], "no lane 'cpu:1'"),
    (["kernels", "--repeats", "0"], "'0' is not a whole number >= 1"),
    (["kernels", "--seed", "-1"], "'-1' is not a whole number >= 0"),
    (["kernels", "--metadata", "desk"], "'desk' is not key=value"),
    (["kernels", "--bandwidth", "fast"], "'fast' is not a number above 0"),
    (["kernels", "--bandwidth", "1e-300"], "'1e-300' per second, expected at least 1"),
    (["kernels", "--metadata", "place=desk\nlamp"], "expected one line"),
    (["kernels", "--flops", "inf"], "'inf' is not a number above 0"),
    (["kernels", "--case", "decode=32*"], "case 'decode=32*': '32*' is no part of a case, expected LABEL="),
    (["kernels", "--colour", "red"], "unrecognized arguments: --colour"),
])
def test_bad_arguments_are_named(fake, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        bench.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert fake.seen == []


@pytest.mark.parametrize("arguments, message", [
    (["--bandwidth", "1e12"], "--bandwidth and --flops are given together"),
    (["--flops", "1e12"], "--bandwidth and --flops are given together"),
    (["--ceilings", "a.json", "--bandwidth", "1", "--flops", "1"], "expected one of the two"),
    (["--json", "nowhere/at/all.json"], "--json nowhere/at/all.json: no file can be written there"),
    (["--html", "."], "--html .: no file can be written there"),
])
def test_what_cannot_go_on_is_said_before_anything_runs(fake, arguments, message, capsys):
    assert bench.main(["kernels", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert fake.seen == []


def test_markdown_goes_to_a_file_or_in_the_place_of_text(fake, tmp_path, capsys):
    path = tmp_path / "out.md"
    assert bench.main(["kernels", "--lane", "cpu", "--markdown", str(path)]) == 0
    assert capsys.readouterr().out.startswith("kernels: lane cpu\n")
    assert path.read_text().startswith("### kernels\n")
    assert bench.main(["kernels", "--lane", "cpu", "--markdown", "-"]) == 0
    assert capsys.readouterr().out.startswith("### kernels\n")


def test_a_page_is_made_of_the_document(fake, tmp_path, monkeypatch):
    page = ModuleType("measure.pages.page")
    page.html = lambda document: f"<p>{len(document['rows'])} row of {document['settings']['lane']}</p>"
    monkeypatch.setitem(sys.modules, "measure.pages.page", page)
    assert bench.main(["kernels", "--lane", "cpu", "--html", str(tmp_path / "out.html")]) == 0
    assert (tmp_path / "out.html").read_text() == "<p>1 row of cpu</p>"


# --- runs that end early

def interrupted(args, report):
    raise KeyboardInterrupt


def terminated(args, report):
    os.kill(os.getpid(), signal.SIGTERM)


def refused(args, report):
    raise BenchError("no op 'x'")


def refused_by_the_engine(args, report):
    raise ConfigError("no such thing")


@pytest.mark.parametrize("measures, why, status", [
    (interrupted, "interrupted", 130), (terminated, "ended by SIGTERM", 130), (refused, "no op 'x'", 2),
    (refused_by_the_engine, "no such thing", 2)])
def test_what_was_measured_is_written_however_it_ends(fake, tmp_path, capsys, measures, why, status):
    path = tmp_path / "out.json"
    fake.measures = measures
    before = signal.getsignal(signal.SIGTERM)
    assert bench.main(["kernels", "--lane", "cpu", "--json", str(path)]) == status
    assert signal.getsignal(signal.SIGTERM) is before
    document = json.loads(path.read_text())
    assert (document["incomplete"], len(document["rows"])) == (why, 1)
    out, err = capsys.readouterr()
    assert out.startswith(f"INCOMPLETE: {why}\n\nkernels: lane cpu\n")
    assert err == f"bench: {why}\n"


@pytest.mark.parametrize("error, why", [
    (FileNotFoundError(2, "No such file or directory", "/nope/x"), "/nope/x: No such file or directory"),
    (MemoryError("Unable to allocate 90.9 TiB"), "MemoryError: Unable to allocate 90.9 TiB")])
def test_what_the_machine_refuses_is_one_line(fake, capsys, error, why):
    def measures(args, report):
        raise error
    fake.measures = measures
    assert bench.main(["kernels", "--lane", "cpu"]) == 2
    assert capsys.readouterr().err == f"bench: {why}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_file_that_cannot_be_written_takes_nothing_with_it(fake, tmp_path, capsys):
    good = tmp_path / "out.md"
    assert bench.main(["kernels", "--lane", "cpu", "--json", "/dev/full", "--markdown", str(good)]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("kernels: lane cpu\n") and "### kernels" in good.read_text()
    assert err == "bench: --json /dev/full: No space left on device\n"


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_only_markdown_goes_to_stdout(fake, capsys, option):
    assert bench.main(["kernels", "--lane", "cpu", option, "-"]) == 2
    assert capsys.readouterr() == ("", f"bench: {option} -: expected a file; stdout gets the tables\n")


def test_a_fault_of_ours_is_written_and_raised(fake, tmp_path):
    path = tmp_path / "out.json"
    fake.measures = lambda args, report: report.no_such_thing
    with pytest.raises(AttributeError):
        bench.main(["kernels", "--lane", "cpu", "--json", str(path)])
    document = json.loads(path.read_text())
    assert document["incomplete"].startswith("AttributeError: ") and len(document["rows"]) == 1


def test_the_status_is_the_commands(fake, capsys):
    fake.measures = lambda args, report: int(not report.is_met)
    assert bench.main(["kernels", "--lane", "cpu"]) == 0

    def misses(args, report):
        report.add(Row("kernels", "x", {}, {"time": Stat("s", 2)}, goal=Goal("time", at_most=1)))
        return int(not report.is_met)
    fake.measures = misses
    assert bench.main(["kernels", "--lane", "cpu"]) == 1


# --- commands are modules

def test_a_missing_package_stops_its_command_only(fake, monkeypatch, capsys):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    assert bench.main(["kernels", "--lane", "cpu"]) == 0
    monkeypatch.setattr(bench.importlib, "import_module", import_module)
    assert bench.main(["against", "--lane", "cpu"]) == 2
    assert capsys.readouterr().err == "bench: against needs the package 'torch', which is not installed\n"


@pytest.mark.parametrize("name", bench.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as error:
        bench.main([name, "--help"])
    out = capsys.readouterr().out
    assert error.value.code == 0
    assert bench.module_of(bench.COMMANDS[name].module).__doc__.splitlines()[0] in out
    for option, group in (("--lane", "run"), ("--preset", "preset"), ("--ceilings FILE", "ceilings"),
                          ("--json", "output")):
        if group in bench.COMMANDS[name].takes:
            assert option in out


def test_the_script_runs_from_anywhere(tmp_path):
    done = subprocess.run([sys.executable, BENCH, "--help"], cwd=tmp_path, capture_output=True,
                          text=True, env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in bench.COMMANDS)


@pytest.mark.parametrize("command", ["floors", "compare"])
def test_a_reader_that_leaves_is_no_failure(tmp_path, command):
    """As `bench.py ... | head -1` does; files are written all the same."""
    floors, page = tmp_path / "floors.json", tmp_path / "page.html"
    assert bench.main(["floors", "--preset", "gemma-3-1b", "--bandwidth", "1e12", "--flops", "1e14",
                       "--json", str(floors)]) == 0
    argv = {"floors": ["--ceilings", floors, "--markdown", "-", "--html", page], "compare": [floors, floors]}[command]
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, BENCH, command, *argv], stdout=written, stderr=subprocess.PIPE, text=True)
    os.close(written)
    assert (done.returncode, done.stderr) == (0, "") and page.exists() == (command == "floors")


HANGING = """
import ctypes, signal, sys, types
from threading import Timer
signal.signal(signal.SIGINT, signal.default_int_handler)            # a shell's background job has it ignored
import bench
from measure.report import Row, Stat

def run(args, report):
    report.add(Row("kernels", "linear", {}, {"time": Stat("s", 1.0)}))
    Timer(1, print, ["it hangs"], {"flush": True}).start()          # the lock is waited for by then
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)

module = types.ModuleType("measure.kernels")
module.run, module.add_arguments = run, lambda parser: None
sys.modules["measure.kernels"] = module
bench.RESCUE_S = 0.1
sys.exit(bench.main(["kernels", "--lane", "cpu", "--json", sys.argv[1]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_waits_for_ever_is_written_when_it_is_told_to_end(tmp_path, number):
    """As one does whose GPU spins: no handler of Python's is called while it waits."""
    path = tmp_path / "out.json"
    with subprocess.Popen([sys.executable, "-c", HANGING, str(path)], cwd=Path(BENCH).parent, stdout=subprocess.PIPE,
                          text=True) as process:
        try:
            assert process.stdout.readline() == "it hangs\n"
            process.send_signal(number)
            assert process.wait(60) == 130
        finally:
            process.kill()
    document = load_document(path)
    assert document["incomplete"].startswith("told to end") and len(document["rows"]) == 1
