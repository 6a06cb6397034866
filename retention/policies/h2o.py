"""H2O (arXiv 2306.14048): heavy hitters, by the attention they have received so far, and as many newest tokens."""

from retention.policies.base import Policy, as_stored


def half(budget):
    return budget // 2


def policy() -> Policy:
    """An entry is worth the attention that all tokens so far have paid it, its own included."""
    return Policy(as_stored, attended=True, window=half, scope="head")
