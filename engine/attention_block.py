"""AttentionBlock: the attention half of a layer, from normed states to the output projection."""


class AttentionBlock:
    """Queries, keys and values, the cache between them, and the way back to the hidden width."""

    def __init__(self, spec, norm_offset, workspace, ops):
        self._eps, self._offset, self._workspace, self.ops = spec.norm_eps, norm_offset, workspace, ops

    def project(self, layer, w, normed, positions, slots, pages):
        """q [n_tokens, n_heads * head_dim]. The layer's k and v are in `pages`, (k_pages, v_pages), afterwards; where
        it reads another layer's, they stay as they are.

        positions  the Positions of the rows of `normed`
        slots      [n_tokens]: where in the pages each row's k and v go; not read where the layer has none
        """
        attention, rows = layer.attention, self._workspace.rows
        qkv = rows("qkv", len(normed), layer.qkv_width)
        q = rows("q", len(normed), attention.q_width)
        self.ops.linear(normed, w.qkv, qkv, self._workspace.scratch)
        angles, temperature = positions.of(attention)
        to = (None, None, None) if layer.kv_from is not None else (slots, *pages)
        self.ops.qk_norm_rope_cache(
            qkv, w.q_norm, w.k_norm, angles, *to, n_heads=attention.n_heads, v_norm=attention.v_norm,
            v_is_k=attention.v_is_k, eps=self._eps, weight_offset=self._offset,
            interleaved=attention.rope is not None and attention.rope.interleaved, qk_norm=attention.qk_norm,
            temperature=temperature, out=q)
        return q

    def attend(self, layer, w, q, pages, paged, out):
        """out [n_tokens, hidden] = the output projection of what `q` sees in `pages`. paged: the pool's PagedBatch or
        PagedInputs of these queries."""
        attention = layer.attention
        mixed = self._workspace.rows("mixed", len(q), attention.q_width)
        self.ops.attention(q, *pages, paged, scale=attention.scale, out=mixed, scratch=self._workspace.scratch,
                            window=attention.window, chunk=attention.chunk)
        self.ops.linear(mixed, w.o, out, self._workspace.scratch)
