"""The command line: generate, chat, inspect and plan, on the demo checkpoint and on one without a tokenizer."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cli import main
from tests import tiny
from tests.golden import GOLDENS

ROOT = Path(__file__).parent.parent
DEMO = str(ROOT / "demo" / "checkpoint")
WORDLESS = str(GOLDENS / "gemma4-dense" / "checkpoint")


def test_generate_prints_prompt_text_and_speed(capsys):
    assert main(["generate", DEMO, "--prompt", "Once upon a time", "--max-tokens", "12", "--temperature", "0"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Once upon a time")
    assert "12 tokens for 1 prompts" in out
    assert "tokens/s" in out


def test_generate_reads_prompts_from_a_file_and_explains(capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("Once\n\nOne day\n")
    assert main(["generate", DEMO, "--prompts", str(tmp_path / "prompts.txt"), "--max-tokens", "3", "--seed", "1",
                 "--page-size", "4", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "for 2 prompts" in out
    assert "pages of 4 tokens" in out


def test_generate_stops_at_a_string(capsys):
    assert main(["generate", DEMO, "--prompt", "Once upon a time", "--temperature", "0", "--stop", "."]) == 0
    assert "." not in capsys.readouterr().out.split("\n")[0]


def test_chat_answers_one_message(capsys):
    assert main(["chat", DEMO, "--message", "Hello", "--max-tokens", "20", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip()


def test_chat_reads_lines_until_the_input_ends():
    done = subprocess.run([sys.executable, "-m", "engine", "chat", DEMO, "--max-tokens", "8", "--temperature", "0"],
                          input="Hello\nHello again\n", capture_output=True, text=True, cwd=ROOT, check=True)
    assert len(done.stdout.strip().splitlines()) >= 2
    assert done.stderr == ""                                    # no progress bars where there is no terminal


def test_inspect_lists_every_tensor(capsys):
    assert main(["inspect", WORDLESS]) == 0
    out = capsys.readouterr().out
    assert "model.language_model.layers.5.self_attn.q_proj.weight" in out
    assert "vision: Gemma 4 tower of 1 layers, hidden 16, 2 heads of 8, 12 x 12 pixels a soft token, at most 70 to " \
           "1120 of them a picture\n102 tensors, 627820 bytes; 0 not read\n" in out


@pytest.mark.parametrize(("family", "vision", "expected"), [
    ("gemma3", None, "vision: SigLIP tower of 2 layers, hidden 24, 2 heads of 12, 8 x 8 pixels a soft token, 9 of them "
                     "a picture\n"),
    ("unified", None, "vision: no tower: one linear, hidden 24, 6 x 6 pixels a soft token, at most 70 to 1120 of "),
    ("gemma4", {}, "vision: none, the checkpoint has no vision tensors\n"),
])
def test_inspect_tells_of_the_vision_part(capsys, tmp_path, family, vision, expected):
    path = tiny.write_checkpoint(tmp_path / "c", tiny.seeing(family), vision=vision)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert expected in out and " 0 not read\n" in out


def test_inspect_names_what_is_wrong(capsys, tmp_path):
    broken = tmp_path / "checkpoint"
    shutil.copytree(WORDLESS, broken)
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    config["text_config"]["layer_types"].pop()
    (broken / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(broken)]) == 1
    assert "problem: model.language_model.layers.5." in capsys.readouterr().out


def test_plan_needs_no_weights(capsys, tmp_path):
    shutil.copy(Path(WORDLESS) / "config.json", tmp_path)
    assert main(["plan", str(tmp_path), "--device", "cuda", "--memory-bytes", "1e9", "--max-seq-len", "4096"]) == 0
    assert "longest sequence 4096 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["plan", "no/such/place"], "no such directory"),
    (["generate", WORDLESS], "no prompt"),
    (["generate", WORDLESS, "--prompt", "x", "--device", "cuda:99"], "device 'cuda"),
    (["generate", DEMO, "--prompt", "x", "--top-p", "2"], "top_p is 2.0"),
    (["chat", WORDLESS, "--message", "x"], "no chat template"),
])
def test_a_users_mistake_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_prompt_that_cannot_run_does_not_stop_the_others(capsys):
    assert main(["generate", DEMO, "--prompt", "Once", "--prompt", "word " * 3000, "--max-tokens", "3"]) == 1
    out = capsys.readouterr().out
    assert "error: the prompt" in out
    assert "3 tokens for 2 prompts" in out
