"""Eviction policies: what each stores per entry and how it ranks entries. One pure function each, one registry.

A new policy is a `score` function and one line:

    retention.policies.register("oldest", Policy(score=lambda stat, position, seen: -1.0 * position))
"""

import difflib

from retention.policies import random, retention, window
from retention.policies.base import Policy

__all__ = ["Policy", "get", "names", "register"]

_REGISTRY: dict[str, Policy] = {}


def register(name: str, policy: Policy) -> None:
    """Makes `policy` known as `name` to generate, Session and the programs. Raises ValueError if the name is taken."""
    if name in _REGISTRY:
        raise ValueError(f"policy {name!r} is registered already; choose another name")
    _REGISTRY[name] = policy


def names() -> list[str]:
    """The registered policies' names, sorted."""
    return sorted(_REGISTRY)


def get(name: str) -> Policy:
    """The registered policy. Raises ValueError, with the nearest names, for an unknown one."""
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown policy {name!r}: {hint}known are {', '.join(names())}")
    return _REGISTRY[name]


register("full", Policy(score=None))
register("window", window.policy())
register("random", random.policy())
register("retention", retention.policy())
