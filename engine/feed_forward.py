"""FeedForward: the MLP half of a layer: dense, or experts of which a router picks some for each token."""


class FeedForward:
    """What a layer adds to the residual after attention, before the last norm on it.

    A pair is a token and one of its experts; buffers of pairs have experts_per_token rows for each token.
    """

    def __init__(self, norms, workspace, ops):
        self._norms, self._workspace, self.ops = norms, workspace, ops

    def __call__(self, layer, w, residual, normed, out):
        """All [n_tokens, hidden]; `normed`, the residual after the layer's pre_mlp_norm, may be overwritten."""
        if layer.moe is None:
            self._dense(layer.dense, w, normed, out)
        elif layer.moe.routing == "softmax":
            self._beside_experts(layer.moe, w, residual, normed, out)
        else:
            self._shared_and_experts(layer.moe, w, normed, out)

    def _dense(self, mlp, w, normed, out, residual=None):
        """out = down(act(gate) * up) + residual."""
        act, scratch = self._workspace.rows("act", len(normed), mlp.intermediate), self._workspace.scratch
        self.ops.gated_linear(normed, w.gate_up, act, scratch, mlp.activation)
        self.ops.linear(act, w.down, out, scratch, residual)

    def _beside_experts(self, moe, w, residual, normed, out):
        """out = norm(dense(normed)) + norm(sum over a token's experts of weight * expert(norm(residual))).

        The router has a norm of its own, on the same residual. Source: HF modeling_gemma4, Gemma4TextDecoderLayer.
        """
        self._dense(moe.dense, w, normed, out)
        self._norms.router(residual, w.router_scale, normed)
        routes = self._route(moe, w, normed)
        self._norms.norm(residual, w.pre_moe_norm, normed)
        self._experts(moe, w, normed, routes, False, routes.weights, normed)
        self._norms.sum(out, w.post_mlp_norm_1, normed, w.post_moe_norm, out)

    def _shared_and_experts(self, moe, w, normed, out):
        """out = shared(normed) + sum over a token's experts of expert(weight * normed).

        Source: HF modeling_llama4, Llama4TextMoe.
        """
        routes = self._route(moe, w, normed)
        scaled = self._workspace.rows("expert_in", len(routes.order), normed.shape[1])
        self.ops.scale_rows(normed, routes.weights, scaled)
        self._experts(moe, w, scaled, routes, True, None, out)
        self._dense(moe.dense, w, normed, out, residual=out)

    def _route(self, moe, w, x):
        """The Routes that the router's scores of x give."""
        logits, scratch = self._workspace.rows("router_logits", len(x), moe.n_experts), self._workspace.scratch
        routes = self._workspace.routes(len(x), moe)
        self.ops.linear(x, w.router, logits, scratch)
        self.ops.moe_route(logits, w.per_expert_scale, moe.routing, routes, scratch)
        return routes

    def _experts(self, moe, w, x, routes, by_pair, weights, out):
        """out = sum over a token's experts of weight * expert(x). x has a row for each pair (by_pair) or token; it may
        be `out`."""
        scratch, n_pairs = self._workspace.scratch, len(routes.order)
        act = self._workspace.rows("expert_act", n_pairs, moe.intermediate)
        of_pair = self._workspace.rows("expert_out", n_pairs, out.shape[1])
        self.ops.moe_gated_linear(x, w.experts_gate_up, routes, act, by_pair, moe.activation, moe.in_out, scratch)
        self.ops.moe_linear(act, w.experts_down, routes, of_pair, moe.in_out, scratch)
        self.ops.moe_combine(of_pair, weights, out)
