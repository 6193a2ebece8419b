"""Goldens: tiny checkpoints and what an independent implementation computes from them (tests/goldens/README.md)."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

GOLDENS = Path(__file__).parent / "goldens"
TEXT_CASES = ("gemma3-text", "gemma3-mm-textonly", "gemma4-dense", "gemma4-assistant-dense", "gemma4-moe", "gemma4-e",
              "llama4-text", "llama4-causal")
VISION_CASES = ("gemma4-vision", "gemma4-vision-bidir", "gemma4-video", "gemma3-vision", "gemma4-unified")
TOLERANCE = 2e-4                    # of max|logit|, float32: float64 differs from the oracle by 1e-6 to 1e-5


class Golden:
    """One case: `prompts` are lists of ids; tensors by name, `golden["p0.logits"]`."""

    def __init__(self, case):
        self.checkpoint = GOLDENS / case / "checkpoint"
        self.tensors = load_file(GOLDENS / case / "goldens.safetensors")
        self.meta = json.loads((GOLDENS / case / "meta.json").read_text())
        self.prompts = [self[f"p{i}.input_ids"].tolist() for i in range(len(self.meta["prompts"]))]

    def __getitem__(self, name):
        return self.tensors[name]

    def images(self, i):
        """Files of the pictures of prompt i, in order."""
        numbers = self.tensors.get(f"p{i}.image_index", ())
        return [self.checkpoint.parent / f"image{j}.png" for j in numbers]

    def videos(self, i):
        """The same of its videos: a list of files each, one a frame."""
        numbers = self.tensors.get(f"p{i}.video_index", ())
        return [sorted(self.checkpoint.parent.glob(f"video{j}_frame*.png")) for j in numbers]

    def greedy(self, i):
        return self[f"p{i}.greedy_ids"].tolist()


def assert_logits_close(got, expected, tolerance=TOLERANCE):
    """Every position within `tolerance` of the largest |logit| of the case's row."""
    assert got.shape == expected.shape
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"largest logit error is {error:.2e} of max|logit|, at most {tolerance:.0e} allowed"
