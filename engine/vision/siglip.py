"""SiglipTower: square pictures, LayerNorms, biases, learned positions. Source: HF modeling_siglip, SiglipVisionModel,
and modeling_gemma3, Gemma3MultiModalProjector."""

import numpy as np

from engine.vision.patches import LEVELS
from engine.vision.picture_attention import PictureAttention


class SiglipTower:
    """Runs of patches to pooled states, in the workspace's buffers."""

    levels = 2 * (LEVELS - np.float32(0.5))
    channels_first, attends = True, True

    def __init__(self, tower, weights, workspace, lane):
        self.spec, self.weights, self._workspace = tower, weights, workspace
        self._attention = PictureAttention(tower, tower.scale, tower.norm_eps, workspace, lane.ops, qk_norm=None,
                                           v_norm=False)
        self.use(lane.ops)

    @staticmethod
    def places(tower, positions):
        """Rows of the table of positions: the patches' own numbers."""
        return positions[:, :1] + tower.grid * positions[:, 1:]

    def use(self, ops):
        """Launches the ops of that table from now on."""
        self.ops = self._attention.ops = ops

    def __call__(self, inputs, observe):
        """[n_soft, hidden]. observe("hidden", residual) gets the patches' states [n_patches, hidden] before the first
        layer and after each, observe("features", states) those that are pooled."""
        ops, tower, weights, rows = self.ops, self.spec, self.weights, self._workspace.rows
        n, scratch = len(inputs.patches), self._workspace.scratch
        residual, normed, branch = (rows(name, n, tower.hidden) for name in ("residual", "normed", "branch"))
        qkv, act = rows("qkv", n, 3 * tower.q_width), rows("act", n, tower.intermediate)
        ops.linear(inputs.patches, weights.patch, residual, scratch)
        ops.add_bias(residual, weights.patch_bias, residual)
        ops.add_rows(residual, weights.positions, inputs.places, residual)
        observe("hidden", residual)
        for w in weights.layers:
            ops.layer_norm(residual, w.norm_1, w.norm_1_bias, tower.norm_eps, normed)
            ops.linear(normed, w.qkv, qkv, scratch)
            ops.add_bias(qkv, w.qkv_bias, qkv)
            ops.linear(self._attention(qkv, None, None, None, inputs.paged), w.o, branch, scratch)
            ops.add_bias(branch, w.o_bias, residual, residual=residual)
            ops.layer_norm(residual, w.norm_2, w.norm_2_bias, tower.norm_eps, normed)
            ops.linear(normed, w.fc1, act, scratch)
            ops.add_bias(act, w.fc1_bias, act, "gelu_tanh")
            ops.linear(act, w.fc2, branch, scratch)
            ops.add_bias(branch, w.fc2_bias, residual, residual=residual)
            observe("hidden", residual)
        ops.layer_norm(residual, weights.post_norm, weights.post_norm_bias, tower.norm_eps, normed)
        observe("features", normed)
        states = rows("soft_states", len(inputs.groups), tower.hidden)
        ops.pool_rows(normed, inputs.groups, 1.0, None, None, states)
        return states
