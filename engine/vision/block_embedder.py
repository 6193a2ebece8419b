"""BlockEmbedder: no tower; a soft token is a block of pixels through one linear between LayerNorms (Gemma 4 12B).
Source: HF modeling_gemma4_unified, Gemma4UnifiedVisionEmbedder."""

import numpy as np

from engine.vision.patches import LEVELS


class BlockEmbedder:
    """Runs of blocks to states, in the workspace's buffers."""

    levels = LEVELS
    channels_first, attends = False, False

    def __init__(self, tower, weights, workspace, lane):
        self.spec, self.weights, self._workspace, self.ops = tower, weights, workspace, lane.ops

    @staticmethod
    def places(tower, positions):
        """Rows of the table of positions, in which those of x and of y take turns."""
        return 2 * positions + np.array([0, 1], np.int32)

    def use(self, ops):
        """Launches the ops of that table from now on."""
        self.ops = ops

    def __call__(self, inputs, observe):
        """[n_soft, hidden]. observe("hidden", states) is called after the linear and after each LayerNorm behind it."""
        ops, tower, w = self.ops, self.spec, self.weights
        states, eps = self._workspace.rows("residual", len(inputs.patches), tower.hidden), tower.norm_eps
        ops.layer_norm(inputs.patches, w.norm_1, w.norm_1_bias, eps, inputs.patches)
        ops.linear(inputs.patches, w.dense, states, self._workspace.scratch)
        ops.add_bias(states, w.dense_bias, states)
        observe("hidden", states)
        ops.layer_norm(states, w.norm_2, w.norm_2_bias, eps, states)
        observe("hidden", states)
        ops.add_rows(states, w.positions, inputs.places, states)
        ops.layer_norm(states, w.pos_norm, w.pos_norm_bias, eps, states)
        observe("hidden", states)
        observe("features", states)
        return states
