"""Checkpoints that several test files open; written once a run, never changed."""

import pytest

from tests import tiny_models as tiny


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{name: directory} of tiny random checkpoints: both families, and windows from below a page to above any prompt."""
    root = tmp_path_factory.mktemp("tiny")
    models = {"gemma3": {}, "gemma4": {}, "gemma3-window-2": {"sliding_window": 2}, "gemma4-window-2": {"sliding_window": 2},
              "gemma3-window-200": {"sliding_window": 200}, "gemma4-window-200": {"sliding_window": 200},
              "gemma4-sliding-only": {"layers": "sss"}}
    return {name: tiny.write(root / name, name[:6], seed, generation={"eos_token_id": tiny.EOS}, **fields)
            for seed, (name, fields) in enumerate(models.items())}
