"""Every activation buffer of a vision encoder, sized once from the most patches of a run."""

import numpy as np

from engine.models.vision_spec import BlockEmbedderSpec, Gemma4TowerSpec
from engine.vision.runs import PAGE
from engine.workspace import Buffers


class VisionWorkspace(Buffers):
    """The Buffers of a tower's runs of up to max_patches patches, n_soft soft tokens.

    In the lane's dtype:
    residual, normed, branch   [max_patches, the tower's hidden]
    soft_states, projected     [n_soft, the tower's hidden], [n_soft, the model's hidden]
    of a tower that attends:
    qkv, q, mixed              [max_patches, 3 * n_heads * head_dim], 2 x [max_patches, n_heads * head_dim]
    k_pages, v_pages           [max_patches / PAGE, PAGE, n_heads, head_dim]
    act                        [max_patches, intermediate]; gate, up: the same, where linears are clipped
    In float32:
    angles                     [max_patches, 2 * n_pairs] of axial RoPE
    """

    def __init__(self, tower, hidden, max_patches, scratch, lane):
        super().__init__(self.shapes(tower, hidden, max_patches), scratch, lane)
        self.k_pages = self.v_pages = None
        if type(tower) is not BlockEmbedderSpec:
            pages = max_patches // PAGE, PAGE, tower.n_heads, tower.head_dim
            self.k_pages, self.v_pages = (self.rows(name, max_patches, tower.q_width).reshape(pages)
                                          for name in ("k_pages", "v_pages"))

    @staticmethod
    def shapes(tower, hidden, max_patches):
        """{name: (rows, widest row, dtype)} of every buffer; dtype None is the lane's."""
        n_soft = max_patches // tower.pool_side**2
        widths = dict.fromkeys(("residual", "normed", "branch"), tower.hidden)
        if type(tower) is not BlockEmbedderSpec:
            widths |= {"qkv": 3 * tower.q_width, "act": tower.intermediate,
                       **dict.fromkeys(("q", "mixed", "k_pages", "v_pages"), tower.q_width)}
        if type(tower) is Gemma4TowerSpec and tower.clipped:
            widths |= dict.fromkeys(("gate", "up"), tower.intermediate)
        shapes = {name: (max_patches, width, None) for name, width in widths.items()}
        if type(tower) is Gemma4TowerSpec:
            shapes["angles"] = max_patches, tower.head_dim, np.float32
        return shapes | {"soft_states": (n_soft, tower.hidden, None), "projected": (n_soft, hidden, None)}

    @classmethod
    def n_bytes(cls, tower, hidden, max_patches, itemsize):
        """What a VisionWorkspace takes beside its scratch, with activations of `itemsize` bytes."""
        return cls.n_bytes_of(cls.shapes(tower, hidden, max_patches), itemsize)
