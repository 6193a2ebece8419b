"""One side of a comparison, in a process of its own: imports, loads and generates when asked, over a pipe.

    python tools/measure/peer/worker.py SIDE OPTIONS_JSON

The first line out is what importing took; then each line in is a request {"do": ..., ...}, each line out its answer.
A process per side keeps import time, thread pools and peak memory apart. Both sides take and give lists of token ids.
"""

import gc
import importlib.metadata
import json
import os
import resource
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
GEMV_BYTES = 1 << 30        # a GEMV sample streams at least this much


class Rawgem:
    """This checkout's engine."""

    def __init__(self, options):
        start = time.perf_counter()
        from engine import LLM, SamplingParams
        self.import_s = time.perf_counter() - start
        self.LLM, self.SamplingParams, self.options = LLM, SamplingParams, options
        self.packages = ("numpy", "ml_dtypes")

    def load(self, path):
        return self.LLM(path, device=self.options["device"], max_seqs=self.options["max_seqs"],
                        max_seq_len=self.options["max_seq_len"], progress=False)

    def outputs(self, llm, prompts, n_tokens, n_logprobs=0):
        params = self.SamplingParams(max_tokens=n_tokens, temperature=0, ignore_eos=True, n_logprobs=n_logprobs)
        outputs = llm.generate(prompts, params)
        failed = [output.error for output in outputs if output.finish_reason == "error"]
        if failed:
            raise RuntimeError(f"rawgem: a request failed: {failed[0]}")
        return outputs

    def generate(self, llm, prompts, n_tokens):
        return [list(output.token_ids) for output in self.outputs(llm, prompts, n_tokens)]

    def likeliest(self, llm, prompts, n_tokens, n):
        """Greedy tokens, a row a prompt; for each the n likeliest in its place, and their log-probabilities."""
        outputs = self.outputs(llm, prompts, n_tokens, n)
        return {"token_ids": [list(output.token_ids) for output in outputs],
                "likeliest": [[list(place)[:n] for place in output.logprobs] for output in outputs],
                "logprobs": [[list(place.values())[:n] for place in output.logprobs] for output in outputs]}


class Transformers:
    """transformers in float32 with eager attention: the same files, the same arithmetic, plain torch operations."""

    def __init__(self, options):
        start = time.perf_counter()
        import torch
        import transformers
        getattr(transformers, options["architecture"])          # imports its module, or loading would
        self.import_s = time.perf_counter() - start
        from transformers.utils import logging
        logging.disable_progress_bar()
        torch.set_num_threads(options["threads"])
        self.torch, self.Model = torch, transformers.AutoModelForCausalLM
        self.packages = ("torch", "transformers")

    def load(self, path):
        model = self.Model.from_pretrained(path, dtype=self.torch.float32, attn_implementation="eager")
        model.generation_config.eos_token_id = None     # run to the length asked for, with no per-token check or filter
        return model

    def generate(self, model, prompts, n_tokens):
        ids = self.torch.tensor(prompts)                # the bench's prompts have one length, so nothing is padded
        output = model.generate(ids, attention_mask=self.torch.ones_like(ids), max_new_tokens=n_tokens,
                                do_sample=False, use_cache=True)
        return output[:, ids.shape[1]:].tolist()

    def logprobs(self, model, prompts, tokens):
        """Log-probabilities of tokens [n_prompts, n_last, n], which may follow the last tokens of the prompts, and the
        largest logit there by size."""
        at = self.torch.tensor(tokens)
        with self.torch.no_grad():
            logits = model(self.torch.tensor(prompts), use_cache=False, logits_to_keep=at.shape[1]).logits
        return {"logprobs": logits.log_softmax(-1).gather(-1, at).tolist(), "largest": logits.abs().max().item()}


class Gemv:
    """NumPy's float32 matrix-vector product, the ceiling of decoding at batch 1 on the CPU lane."""

    def __init__(self, options):
        start = time.perf_counter()
        import numpy
        self.import_s = time.perf_counter() - start
        self.numpy = numpy
        self.packages = ("numpy",)

    def stream(self, matrices):
        """Bytes a second of w @ x over [out, in] matrices of the given shapes, each product on other memory."""
        np = self.numpy
        weights = [np.full(shape, 0.01, np.float32) for shape in matrices]
        vectors = [np.ones(shape[1], np.float32) for shape in matrices]
        n_bytes = sum(w.nbytes for w in weights)
        n_passes = -(-GEMV_BYTES // n_bytes)
        for n in (1, n_passes):                         # the first, untimed, wakes BLAS's threads
            start = time.perf_counter()
            for _ in range(n):
                for w, x in zip(weights, vectors, strict=True):
                    w @ x
        return n * n_bytes / (time.perf_counter() - start)


SIDES = {"rawgem": Rawgem, "transformers": Transformers, "gemv": Gemv}


def version(package):
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_bytes():
    """The most memory this process has held so far. Linux counts ru_maxrss on from the process that started this one,
    VmHWM from its own start."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Requests:
    """What a worker can be asked; each answers with a dict."""

    def __init__(self, side):
        self.side = side
        self.model = None

    def load(self, path):
        self.model = None
        gc.collect()
        start = time.perf_counter()
        self.model = self.side.load(path)
        return {"seconds": time.perf_counter() - start}

    def generate(self, prompts, n_tokens):
        start = time.perf_counter()
        ids = self.side.generate(self.model, prompts, n_tokens)
        seconds = time.perf_counter() - start
        lengths = [len(row) for row in ids]
        if lengths != [n_tokens] * len(prompts):
            raise RuntimeError(f"asked for {n_tokens} tokens to each of {len(prompts)} prompts, got {lengths}")
        return {"seconds": seconds, "token_ids": ids}

    def likeliest(self, prompts, n_tokens, n):
        return self.side.likeliest(self.model, prompts, n_tokens, n)

    def logprobs(self, prompts, tokens):
        return self.side.logprobs(self.model, prompts, tokens)

    def peak(self):
        return {"bytes": peak_bytes()}

    def gemv(self, matrices):
        return {"bytes_per_s": self.side.stream(matrices)}


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                       # what a library prints must not land among the answers
    sys.path[0] = str(ROOT)                             # not this folder, which has an engine.py of its own

    def answer(value):
        print(json.dumps(value), file=answers, flush=True)

    try:
        side = SIDES[sys.argv[1]](json.loads(sys.argv[2]))
        answer({"import_s": side.import_s, "import_bytes": peak_bytes(),
                "versions": {package: version(package) for package in side.packages}})
        requests = Requests(side)
        for line in sys.stdin:
            request = json.loads(line)
            answer(getattr(requests, request.pop("do"))(**request))
    except Exception:
        answer({"error": traceback.format_exc()})


if __name__ == "__main__":
    main()
