"""Whole-model peers: what against_model asks of one.

    peer.ready(n_tokens)        compiles and captures; how long that took, 0.0 for nothing
    peer.logits(ids, first)     [n_seqs, n - first, vocab] float32 after the tokens of ids [n_seqs, n] from `first` on,
                                by what will be timed, to be compared
    peer.samples(n)             seconds of a decoded token, from the case's context on in each sample, or of a prompt to
                                its first token
    peer.notes, peer.close()
"""

import importlib.util
import time

import numpy as np

from measure.peer import torch_arrays
from measure.report import BenchError


class TorchPeer:
    """measure/peer/torch_model.py on the Core's weights; eager, or compiled and replayed as a CUDA graph.

    attend  how a decode step attends: sdpa, matmul or flex
    """

    def __init__(self, core, case, max_len, attend="sdpa", is_compiled=False):
        import torch

        from measure.peer import torch_model
        self.torch, self.lane, self.case, self.is_compiled = torch, core.lane, case, is_compiled
        self.notes, self.rng = (), np.random.default_rng(0)
        reason = torch_model.why_not(core.spec)
        if reason:
            raise BenchError(f"the torch model has no branch: {reason}")
        with torch_arrays.torch_running(self.lane):
            self.model = torch_model.TorchModel(core.spec, core.weights, core.lane, case.n_seqs, max_len, attend)
            if case.is_decode:
                sizes = sorted({layer.size for layer in self.model.layers})
                self.notes = (f"theirs reads its whole cache: {' or '.join(map(str, sizes))} positions",)
        self.Greedy = torch_model.Greedy

    def _tensor(self, ids):
        return self.torch.tensor(ids, device=self.model.embed.device)

    def logits(self, ids, first):
        ids = self._tensor(ids)
        with torch_arrays.torch_running(self.lane):
            found = [torch_arrays.as_numpy(self.model.prefill(ids[:, :first + 1]))]
            for at in range(first + 1, len(ids.T)):
                found.append(torch_arrays.as_numpy(self.model.decode(ids[:, at:at + 1], self._tensor([at]))))
        return np.stack(found, 1)

    def ready(self, n_tokens):
        case, began = self.case, time.perf_counter()
        self.n_tokens = n_tokens
        with torch_arrays.torch_running(self.lane):
            if case.is_decode:
                self.model.fill_cache()
                if self.is_compiled:
                    self.model.decode = torch_arrays.compiled(self.model.decode, self.lane)
                first = self._tensor(self.rng.integers(3, self.model.spec.vocab, (case.n_seqs, 1)))
                greedy = self.Greedy(self.model, first, case.max_context - 1)
                greedy.step()
                self._step, why = torch_arrays.captured(greedy.step, self.lane)
                self._position = greedy.position
            else:
                self.ids = self._tensor(self.rng.integers(3, self.model.spec.vocab, (case.n_seqs, case.max_context)))
                if self.is_compiled:
                    self.model.expect_prompts(case.max_context)
                    self.model.prefill = torch_arrays.compiled(self.model.prefill, self.lane)
                self._first = lambda: self.model.prefill(self.ids).argmax(-1)
                self._first()
                why = ""
            self._wait()
        if why:
            self.notes += (f"theirs runs eagerly: {why}",)
        return time.perf_counter() - began if self.is_compiled else 0.0

    def _wait(self):
        if self.lane.name == "cuda":
            self.lane.stream.synchronize()

    def samples(self, n):
        with torch_arrays.torch_running(self.lane):
            return [self._decode_sample() if self.case.is_decode else self._prefill_sample() for _ in range(n)]

    def _decode_sample(self):
        self._position.fill_(self.case.max_context - 1)         # where the other side begins
        self._wait()
        began = time.perf_counter()
        for _ in range(self.n_tokens):
            self._step()
        self._wait()
        return (time.perf_counter() - began) / self.n_tokens

    def _prefill_sample(self):
        self._wait()
        began = time.perf_counter()
        self._first().tolist()
        return time.perf_counter() - began

    def close(self):
        """Gives the cache and the compiled code back."""
        self.model = self._step = self._first = self._position = None
        torch_arrays.forget_compiled()


def torch_peer(**options):
    return lambda core, case, max_len, model: TorchPeer(core, case, max_len, **options)


def transformers_peer(core, case, max_len, model):
    from measure.peer.peer_transformers import TransformersPeer
    return TransformersPeer(core, case, max_len, model)


# {peer as --peer names it: {peer as the report names it: open}}
MODELS = {
    "torch": {"torch": torch_peer()},
    "compiled": {f"compiled, {attend}": torch_peer(attend=attend, is_compiled=True) for attend in ("sdpa", "flex")},
    "transformers": {"transformers": transformers_peer},
}
ON_GPU = {"compiled, flex": "flex_attention's decoding kernel is a GPU's"}


def model_peers(names, lane, report):
    """{name: open} of the peers asked for; those that cannot run are skipped with the reason."""
    found = {}
    for name in names:
        missing = [package for package in dict.fromkeys(("torch", name if name == "transformers" else "torch"))
                   if importlib.util.find_spec(package) is None]
        if name not in MODELS:
            report.skip(f"whole models: {name}", f"it is none, as {', '.join(MODELS)} are")
        for shown, open_peer in MODELS.get(name, {}).items():
            reason = f"{' and '.join(missing)} not installed" if missing else ""
            if reason or (lane.name != "cuda" and shown in ON_GPU):
                report.skip(f"whole models: {shown}", reason or ON_GPU[shown])
            else:
                found[shown] = open_peer
    return found
