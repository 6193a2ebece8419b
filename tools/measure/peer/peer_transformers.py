"""transformers as a whole-model peer: its own class of a model on the engine's weights, where they are.

Decoding is its documented best: generate() with a static cache, for which it compiles a step and, on a GPU, replays it
as a CUDA graph, all by itself; how it computes experts is left to it too. Prompts come with the cache of its choice: a
static one would cost it the fused attention. Imported where transformers runs.
"""

import json
import time
from contextlib import contextmanager

import numpy as np
import torch
import transformers
from torch import nn
from transformers.utils import logging

from engine.tensors import HEADS, PREFIXES, targets
from measure.peer import torch_arrays
from measure.report import BenchError

MOST_NAMES = 4


def tensors_of(spec, weights):
    """{name in transformers: tensor} of all Weights of a text model. Views of the arrays, but for norms of a lane that
    added their offset: transformers adds it itself."""
    folded, found = spec.norm_offset - weights.norm_offset, {}
    for target in targets(spec, untied_head=weights.head is not weights.embed):
        owner, _, attribute = target.name.rpartition(".")
        array = getattr(weights.layers[int(owner.split(".")[1])] if owner else weights, attribute)
        tensor, begin = torch_arrays.as_torch(array), 0
        if target.is_norm and folded:
            tensor = tensor - folded
        for name, shape in target.parts:
            found[name if name in HEADS else PREFIXES[-1] + name] = tensor[begin:begin + shape[0]]
            begin += shape[0]
    found[HEADS[0]] = torch_arrays.as_torch(weights.head)
    return found


@contextmanager
def without_weights():
    """Parameters of modules that are made in this context keep no memory; buffers are what they are. While it is made,
    one parameter may take its size on the host: of Llama 4's experts."""
    register = nn.Module.register_parameter

    def register_empty(module, name, value):
        register(module, name, None if value is None else nn.Parameter(value.to("meta"), requires_grad=False))
    nn.Module.register_parameter = register_empty
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def model_of(config, spec, weights):
    """The model of a config.json that computes what `spec` says, on the tensors of Weights. Raises BenchError."""
    text = {**config.get("text_config", config), "num_hidden_layers": len(spec.layers)}
    tensors = tensors_of(spec, weights)
    head = tensors[HEADS[0]]
    with without_weights():
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**text), dtype=head.dtype, attn_implementation="sdpa")
    _, unknown = model.load_state_dict(tensors, strict=False, assign=True)
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing or unknown:
        names = ", ".join([*missing, *unknown][:MOST_NAMES])
        raise BenchError(f"transformers {transformers.__version__}: {type(model).__name__} has other weights: {names}")
    return model.to(head.device).eval()


class TransformersPeer:
    """What measure/peer/peer_models.py asks of a peer.

    model  the measure.models.Model that the Core was opened for
    """

    def __init__(self, core, case, max_len, model):
        logging.set_verbosity_error()
        self.notes = ("theirs is generate(), its work on the host included",)
        self.lane, self.case, self.rng = core.lane, case, np.random.default_rng(0)
        self.vocab = core.spec.vocab
        config = model.config or json.loads((model.path / "config.json").read_text())
        with torch_arrays.torch_running(self.lane):
            self.model = model_of(config, core.spec, core.weights)
            # One for all calls, because a recorded graph reads it where it is.
            self.cache = transformers.StaticCache(self.model.config, max_len) if case.is_decode else None
        # No token ends a sequence, so that none is looked for; nor does the config.json choose the KV cache.
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)

    def _generate(self, ids, n_tokens, on_logits):
        """Of prompts [n_seqs, n], n_tokens further ones each. on_logits(ids so far, logits) -> logits, for each."""
        cache = {}
        if self.cache is not None:
            self.cache.reset()
            cache = {"past_key_values": self.cache}
        with torch_arrays.torch_running(self.lane):
            self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens,
                                logits_processor=transformers.LogitsProcessorList([on_logits]), **cache)
            self._wait()

    def _tensor(self, ids):
        return torch.tensor(ids, device=self.model.device)

    def logits(self, ids, first):
        known, seen = self._tensor(ids), []

        def next_known(so_far, scores):
            seen.append(torch_arrays.as_numpy(scores))
            token = known[:, so_far.shape[1]:][:, :1]           # none after the last
            return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0) if len(token.T) else scores
        self._generate(known[:, :first + 1], len(known.T) - first, next_known)
        return np.stack(seen, 1)

    def ready(self, n_tokens):
        self.n_tokens, began = n_tokens, time.perf_counter()
        n = max(1, self.case.max_context - self.case.is_decode)
        self.ids = self._tensor(self.rng.integers(3, self.vocab, (self.case.n_seqs, n)))
        try:
            self.samples(2)                                     # it compiles, then it records
        except Exception as error:                              # transformers 5.17: not for Llama 4's chunks
            if self.cache is None:
                raise
            self.cache = None
            self.notes += (f"theirs has no static cache, nor compiles: {torch_arrays.why(error)}",)
            self.samples(2)
        return time.perf_counter() - began if self.case.is_decode and self.lane.name == "cuda" else 0.0

    def _wait(self):
        if self.lane.name == "cuda":
            self.lane.stream.synchronize()

    def samples(self, n):
        return [self._sample() for _ in range(n)]

    def _sample(self):
        """A prompt to its first token; or a token, of those after the first."""
        first_at = []

        def note(so_far, scores):
            if not first_at:
                self._wait()
                first_at.append(time.perf_counter())
            return scores
        began = time.perf_counter()
        if self.case.is_prompt:
            self._generate(self.ids, 1, note)
            return time.perf_counter() - began
        self._generate(self.ids, self.n_tokens + 1, note)
        return (time.perf_counter() - first_at[0]) / self.n_tokens

    def close(self):
        """Gives the cache and the compiled code back."""
        self.model = self.cache = None
        torch_arrays.forget_compiled()
