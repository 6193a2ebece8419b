"""Norms: the RMSNorm ops of one model, with what the model says once about them."""


class Norms:
    """ops.rms_norm and its like; a norm is over a row, whose states are [n_tokens, hidden] where nothing else is said.

    offset  what is added to every weight
    """

    def __init__(self, spec, offset, ops):
        self.ops, self._eps, self._offset = ops, spec.norm_eps, offset
        self._round_first = spec.norm_rounds_first

    def norm(self, x, weight, out):
        """out = norm(x)."""
        self.ops.rms_norm(x, weight, self._eps, self._offset, out, round_first=self._round_first)

    def add(self, residual, branch, post_weight, next_weight, layer_scalar, out):
        """residual = (residual + norm(branch)) * layer_scalar; out = norm(residual). A post_weight of None adds the
        branch as it is, a layer_scalar of None multiplies by nothing, a next_weight of None leaves `out` alone."""
        self.ops.add_norm(residual, branch, post_weight, next_weight, self._eps, self._offset, layer_scalar,
                           None if next_weight is None else out, round_first=self._round_first)

    def sum(self, a, a_weight, b, b_weight, out):
        """out = norm(a) + norm(b)."""
        self.ops.add_norms(a, a_weight, b, b_weight, self._eps, self._offset, out)

    def router(self, x, scale, out):
        """out = what a softmax router reads of the residual: x / rms(x) * scale / sqrt(hidden)."""
        self.ops.router_norm(x, scale, x.shape[1] ** -0.5, self._eps, out)
