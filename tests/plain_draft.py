"""The draft model written down once more, from its definition alone: one sequence, one step after the other, in NumPy.

Nothing of engine/ is used but what a checkpoint's fields mean; weights are the file's, K and V are given.
"""

import json

import numpy as np
from safetensors.numpy import load_file

from tests.golden import GOLDENS


class PlainDraft:
    """The draft of a golden.

    dtype     np.float64, or np.float32 with `rounds`
    rounds    rounds every array that a layer hands on: identity, or to bfloat16
    geometry  (pos_offset, extra_keys)
    """

    def __init__(self, case, dtype=np.float64, rounds=lambda x: x, geometry=(0, 0)):
        path = GOLDENS / case / "assistant"
        config = json.loads((path / "config.json").read_text())
        self.text, self.top_k = config["text_config"], config["centroid_intermediate_top_k"]
        self.is_ordered = config["use_ordered_embeddings"]
        self.dtype, self.rounds, self.geometry = dtype, rounds, geometry
        tensors = load_file(path / "model.safetensors")
        self.w = {name: values if values.dtype.kind == "i" else values.astype(dtype)
                  for name, values in tensors.items()}

    def norm(self, x, weight):
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.text["rms_norm_eps"])
        return self.rounds((x * weight).astype(self.dtype))

    def linear(self, name, x):
        return self.rounds(self.w[name + ".weight"] @ x)

    def rope(self, q, kind, position):
        """q [n_heads, head_dim], pairs (j, j + head_dim / 2)."""
        fields, dim = self.text["rope_parameters"][kind], q.shape[1]
        rotated = int(fields.get("partial_rotary_factor", 1.0) * (dim // 2))
        angle = np.zeros(dim // 2, self.dtype)
        angle[:rotated] = position * fields["rope_theta"] ** (-2 * np.arange(rotated) / dim)
        cos, sin, half = np.cos(angle), np.sin(angle), dim // 2
        a, b = q[:, :half], q[:, half:]
        return self.rounds(np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1).astype(self.dtype))

    def attend(self, at, kind, y, keys, last):
        """keys: (K, V) [n_positions, n_kv_heads, head_dim] from position 0 on; `last` is the last that counts."""
        k, v = (x.astype(self.dtype) for x in keys)
        pos_offset, extra_keys = self.geometry
        window = self.text["sliding_window"] + extra_keys if kind == "sliding_attention" else last + 1
        first, dim = max(0, last - window + 1), k.shape[2]
        q = self.linear(at + "q_proj", y).reshape(-1, dim)
        q = self.rope(self.norm(q, self.w[at + "q_norm.weight"]), kind, last + pos_offset)
        group = len(q) // k.shape[1]
        heads = []
        for h, row in enumerate(q):
            scores = k[first:last + 1, h // group] @ row
            p = np.exp(scores - scores.max())
            heads.append(self.rounds(p / p.sum()) @ v[first:last + 1, h // group])
        return self.linear(at + "o_proj", self.rounds(np.concatenate(heads)))

    def step(self, embedded, state, kv, last):
        """(final states [hidden], what the next step takes for the target's state [backbone]). kv: {kind: (K, V)}"""
        w = self.w
        z = self.rounds(w["pre_projection.weight"] @ np.concatenate([embedded, state]).astype(self.dtype))
        for i, kind in enumerate(self.text["layer_types"]):
            at = f"model.layers.{i}."
            y = self.attend(at + "self_attn.", kind, self.norm(z, w[at + "input_layernorm.weight"]), kv[kind], last)
            z = self.rounds(z + self.norm(y, w[at + "post_attention_layernorm.weight"]))
            y = self.norm(z, w[at + "pre_feedforward_layernorm.weight"])
            gate, up = self.linear(at + "mlp.gate_proj", y), self.linear(at + "mlp.up_proj", y)
            gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            y = self.linear(at + "mlp.down_proj", self.rounds((gate * up).astype(self.dtype)))
            z = z + self.norm(y, w[at + "post_feedforward_layernorm.weight"])
            z = self.rounds(z * w[at + "layer_scalar"])
        g = self.norm(z, w["model.norm.weight"])
        return g, self.linear("post_projection", g)

    def logits(self, g):
        logits = self.w["model.embed_tokens.weight"] @ g
        if self.is_ordered:
            scores = self.w["masked_embedding.centroids.weight"] @ g
            chosen = sorted(range(len(scores)), key=lambda c: -scores[c])[:self.top_k]
            tokens = self.w["masked_embedding.token_ordering"].reshape(len(scores), -1)[chosen]
            masked = np.full_like(logits, -np.inf)
            masked[tokens] = logits[tokens]
            return masked
        return logits

    def draft(self, embed, token, state, kv, last, n_steps, forced=None):
        """([n_steps] ids, logits [n_steps, vocab], final states [n_steps, hidden]). embed(token) is what the target's
        layers get of it; `forced` are the ids that steps go on with."""
        ids, logits, states = [], [], []
        for s in range(n_steps):
            g, state = self.step(embed(token).astype(self.dtype), np.asarray(state, self.dtype), kv, last)
            states.append(g)
            logits.append(self.logits(g))
            ids.append(int(logits[-1].argmax()))
            token = ids[-1] if forced is None else forced[s]
        return ids, np.stack(logits), np.stack(states)
