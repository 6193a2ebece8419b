"""Something inside a step fails, when a test says so."""


class Broken(Exception):
    """Something inside a step failed."""


def break_at(patch, owner, name, call):
    """owner.name raises Broken at its call-th call, and works before and after. patch: a MonkeyPatch."""
    function, n_calls = getattr(owner, name), 0

    def fails(*args, **kwargs):
        nonlocal n_calls
        n_calls += 1
        if n_calls == call:
            raise Broken
        return function(*args, **kwargs)

    patch.setattr(owner, name, fails)
