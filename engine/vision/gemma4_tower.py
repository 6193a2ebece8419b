"""Gemma4Tower: pictures of any aspect ratio, axial RoPE, sandwich norms, clipped linears. Source: HF modeling_gemma4,
Gemma4VisionModel."""

import numpy as np

from engine.vision.patches import LEVELS
from engine.vision.picture_attention import PictureAttention

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")        # rows of a layer's bounds


class Gemma4Tower:
    """Runs of patches to pooled states, in the workspace's buffers."""

    levels = 2 * (LEVELS - np.float32(0.5))                 # in float32: in bfloat16 half of the 256 would differ
    channels_first, attends = False, True

    def __init__(self, tower, weights, workspace, lane):
        self.spec, self.weights, self._workspace = tower, weights, workspace
        self._inv_freq = lane.to_device(inv_freq(tower))
        self._attention = PictureAttention(tower, 1.0, tower.norm_eps, workspace, lane.ops, qk_norm="weighted",
                                           v_norm=True)
        self.use(lane.ops)

    @staticmethod
    def places(tower, positions):
        """Rows of the table of positions: x, and behind the columns' rows y."""
        return positions + np.array([0, tower.n_positions], np.int32)

    def use(self, ops):
        """Launches the ops of that table from now on."""
        self.ops = self._attention.ops = ops

    def __call__(self, inputs, observe):
        """[n_soft, hidden]. observe("hidden", residual) gets the patches' states [n_patches, hidden] before the first
        layer and after each, observe("features", states) what is returned."""
        ops, tower, weights, rows = self.ops, self.spec, self.weights, self._workspace.rows
        n = len(inputs.patches)
        residual, normed, branch = (rows(name, n, tower.hidden) for name in ("residual", "normed", "branch"))
        ops.linear(inputs.patches, weights.patch, residual, self._workspace.scratch)
        ops.add_rows(residual, weights.positions, inputs.places, residual)
        n_pairs = tower.head_dim // 2
        angles = rows("angles", n, 2 * n_pairs).reshape(n, 2, n_pairs)
        ops.rope_angles(inputs.positions, self._inv_freq, angles)
        observe("hidden", residual)
        ops.rms_norm(residual, weights.layers[0].input_norm, tower.norm_eps, 0.0, normed)
        for i, w in enumerate(weights.layers):
            self._project(w, normed, branch)
            mixed = self._attention(rows("qkv", n, 3 * tower.q_width), w.q_norm, w.k_norm, angles, inputs.paged)
            self._linear(w, "o", mixed, w.o, branch)
            self._add(residual, branch, w.post_attention_norm, w.pre_mlp_norm, normed)
            self._mlp(w, normed, branch)
            next_norm = weights.layers[i + 1].input_norm if i + 1 < len(weights.layers) else None
            self._add(residual, branch, w.post_mlp_norm, next_norm, normed)
            observe("hidden", residual)
        states = rows("soft_states", len(inputs.groups), tower.hidden)
        ops.pool_rows(residual, inputs.groups, tower.hidden**0.5, weights.std_bias, weights.std_scale, states)
        observe("features", states)
        return states

    def _add(self, residual, branch, post_norm, next_norm, out):
        """residual += norm(branch); out = norm(residual), where there is a next_norm."""
        self.ops.add_norm(residual, branch, post_norm, next_norm, self.spec.norm_eps, 0.0, None,
                          None if next_norm is None else out)

    def _project(self, w, normed, free):
        """q, k and v of `normed`, into the buffer qkv; clipped ones are products of their own, as inputs differ. free:
        a buffer like `normed` that may be overwritten."""
        rows, width = self._workspace.rows, self.spec.q_width
        qkv = rows("qkv", len(normed), 3 * width)
        if w.bounds is None:
            self.ops.linear(normed, w.qkv, qkv, self._workspace.scratch)
            return
        alone = rows("mixed", len(normed), width)
        for j, name in enumerate(("q", "k", "v")):
            self._clip(w, name, normed, free, is_input=True)
            self.ops.linear(free, w.qkv[j * width:(j + 1) * width], alone, self._workspace.scratch)
            self._clip(w, name, alone, qkv, first=j * width)

    def _mlp(self, w, normed, branch):
        """branch = down(gelu(gate(normed)) * up(normed)); both may be overwritten."""
        rows, width = self._workspace.rows, self.spec.intermediate
        act = rows("act", len(normed), width)
        if w.bounds is None:
            self.ops.gated_linear(normed, w.gate_up, act, self._workspace.scratch)
        else:
            for j, name in enumerate(("gate", "up")):
                self._clip(w, name, normed, branch, is_input=True)
                out = rows(name, len(normed), width)
                self.ops.linear(branch, w.gate_up[j * width:(j + 1) * width], out, self._workspace.scratch)
                self._clip(w, name, out, out)
            self.ops.gate_per_layer(rows("gate", len(normed), width), rows("up", len(normed), width), 0, act)
        self._linear(w, "down", act, w.down, branch)

    def _linear(self, w, name, x, weight, out):
        """out = x @ weight.T, both within their bounds; x may be overwritten."""
        if w.bounds is not None:
            self._clip(w, name, x, x, is_input=True)
        self.ops.linear(x, weight, out, self._workspace.scratch)
        if w.bounds is not None:
            self._clip(w, name, out, out)

    def _clip(self, w, name, x, out, first=0, is_input=False):
        """out[:, first:] = x within the bounds of a linear's input or output."""
        bounds = w.bounds[LINEARS.index(name)]
        self.ops.clamp(x, bounds[:2] if is_input else bounds[2:], out, first=first)


def inv_freq(tower):
    """theta^(-4j / head_dim), j < head_dim / 4, once for the pairs that turn by x and once for those that turn by y;
    float32, each rounded once from float64. The weights' order makes them the pairs (j, j + head_dim / 2)."""
    j = np.arange(tower.head_dim // 4, dtype=np.float64)
    return np.tile((tower.rope_theta ** (-4 * j / tower.head_dim)).astype(np.float32), 2)
