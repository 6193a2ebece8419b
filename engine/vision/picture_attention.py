"""PictureAttention: patches attend to all patches of their picture, however many pictures a run has."""


class PictureAttention:
    """From the fused projection of q, k and v to what each patch mixes of its picture. Nothing as large as the square
    of a picture is held: k and v lie in the workspace's pages, and the kernel of text attention walks them.

    eps      of the norms
    qk_norm  "weighted": q and k of each head are normed before RoPE, times weights; None: not at all
    v_norm   v is normed, without a weight
    """

    def __init__(self, tower, scale, eps, workspace, ops, *, qk_norm, v_norm):
        self.ops, self._tower, self._scale, self._eps, self._workspace = ops, tower, scale, eps, workspace
        self._qk_norm, self._v_norm = qk_norm, v_norm

    def __call__(self, qkv, q_norm, k_norm, angles, paged):
        """[n_patches, n_heads * head_dim], a workspace buffer. angles: of rope_angles, or None to rotate nothing."""
        tower, workspace = self._tower, self._workspace
        q, mixed = (workspace.rows(name, len(qkv), tower.q_width) for name in ("q", "mixed"))
        pages = workspace.k_pages, workspace.v_pages
        self.ops.qk_norm_rope_cache(qkv, q_norm, k_norm, angles, paged.slots, *pages, n_heads=tower.n_heads,
                                    v_norm=self._v_norm, v_is_k=False, eps=self._eps, weight_offset=0.0,
                                    qk_norm=self._qk_norm, out=q)
        self.ops.attention(q, *pages, paged, scale=self._scale, out=mixed, scratch=workspace.scratch)
        return mixed
