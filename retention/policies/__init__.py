"""Eviction policies: what each stores per entry and how it ranks entries. One pure function each, one registry.

A new policy is a `score` function and one line:

    retention.policies.register("oldest", Policy(score=lambda stat, position, seen: -1.0 * position))

It then runs under every name, flag and config that takes a policy, and in the tests' matrix. What the others need of the model, see `Policy`.
"""

from retention.names import check_name
from retention.policies import (
    ada_snapkv,
    epikv,
    expected_attention,
    h2o,
    infokv,
    keydiff,
    knorm,
    kvzip,
    lagkv,
    pyramidkv,
    random,
    retention,
    rkv,
    snapkv,
    tova,
    window,
)
from retention.policies.base import Policy, Streams, Written

__all__ = ["Policy", "Streams", "Written", "get", "names", "register"]

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
    check_name("policy", name, names())
    return _REGISTRY[name]


register("full", Policy(score=None))
register("random", random.policy())
register("window", window.policy())
register("h2o", h2o.policy())
register("tova", tova.policy())
register("snapkv", snapkv.policy())
register("pyramidkv", pyramidkv.policy())
register("ada_snapkv", ada_snapkv.policy())
register("knorm", knorm.policy())
register("keydiff", keydiff.policy())
register("expected_attention", expected_attention.policy())
register("lagkv", lagkv.policy())
register("rkv", rkv.policy())
register("kvzip", kvzip.policy())
register("epikv_flat", epikv.flat_policy())
register("epikv_band", epikv.band_policy())
register("epikv_seg", epikv.segment_policy())
register("infokv", infokv.policy())
register("retention", retention.policy())
