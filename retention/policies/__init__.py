"""Eviction policies: what each stores per entry and how it ranks entries. One pure function each, one registry.

A new policy is a `score` function and one line:

    retention.policies.register("oldest", Policy(score=lambda stat, position, seen: -1.0 * position))

In this process it then runs under every name and config that takes a policy, and in the tests' matrix. What the others need of the model, see `Policy`.
A name may say options behind a colon, arguments of that policy's own function: "retention:floor=16", "snapkv:window=16,kernel=5".
"""

import ast
import dataclasses
import functools
import inspect
from collections.abc import Callable

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

_REGISTRY: dict[str, Callable[..., Policy]] = {}


def register(name: str, policy: Policy | Callable[..., Policy]) -> None:
    """Makes `policy`, or what makes it of options that all have defaults, known as `name` to generate, Session and the programs.

    Raises ValueError for a name that is taken or none, and for what is neither.
    """
    if not isinstance(name, str) or not name or set(name) & set(":,"):
        raise ValueError(f"a policy's name must be a text without ':' and ',', got {name!r}")
    if name in _REGISTRY:
        raise ValueError(f"policy {name!r} is registered already; choose another name")
    made = isinstance(policy, Policy)
    if not made and (not callable(policy) or any(one.default is one.empty for one in inspect.signature(policy).parameters.values())):
        raise ValueError(f"policy {name!r} must be a Policy, as Policy(score=...), or a function that makes one of options with defaults, got {policy!r}")
    _REGISTRY[name] = (lambda: policy) if made else policy


def names() -> list[str]:
    """The registered policies' names, sorted."""
    return sorted(_REGISTRY)


def get(name: str) -> Policy:
    """The registered policy, as the options behind its name make it.

    Raises ValueError, with the nearest names, for an unknown name or option, and for a value of another kind than its default.
    """
    base, _, options = name.partition(":") if isinstance(name, str) else (name, "", "")
    check_name("policy", base, names())
    return _made(base, _REGISTRY[base], options)


def description(name: str) -> str | None:
    """What tells a policy that was registered elsewhere from another of the same name: what it declares and its functions' source, as far as Python has
    it. None for this package's own, which its version tells."""

    def told(value) -> str:
        if isinstance(value, functools.partial):
            return f"{told(value.func)} {value.args} {value.keywords}"
        try:
            return inspect.getsource(value)
        except (OSError, TypeError):
            return ""

    policy = get(name)
    if name.partition(":")[0] in OWN:
        return None
    functions = [told(value) for field in dataclasses.fields(policy) if callable(value := getattr(policy, field.name))]
    return repr((name, policy.declared(), functions))


# Once for each: programs are compiled for the very policy that they are given.
@functools.cache
def _made(name: str, make: Callable[..., Policy], options: str) -> Policy:
    known = inspect.signature(make).parameters
    if options and not known:
        raise ValueError(f"policy {name!r} has no options, got {options!r}")
    arguments = {}
    for one in options.split(",") if options else ():
        option, _, text = one.partition("=")
        check_name(f"option of policy {name!r}", option, known)
        default = known[option].default
        if option in arguments:
            raise ValueError(f"option {option!r} of policy {name!r} is given twice, in {options!r}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):
            value = None
        if type(value) is not type(default) and (type(value), type(default)) != (int, float):
            raise ValueError(f"option {option!r} of policy {name!r} must be of its default's kind, as in {option}={default!r}, got {text!r}")
        arguments[option] = value
    return make(**arguments)


register("full", Policy(score=None))
register("random", random.policy)
register("window", window.policy)
register("h2o", h2o.policy)
register("tova", tova.policy)
register("snapkv", snapkv.policy)
register("pyramidkv", pyramidkv.policy)
register("ada_snapkv", ada_snapkv.policy)
register("knorm", knorm.policy)
register("keydiff", keydiff.policy)
register("expected_attention", expected_attention.policy)
register("lagkv", lagkv.policy)
register("rkv", rkv.policy)
register("kvzip", kvzip.policy)
register("epikv_flat", epikv.flat_policy)
register("epikv_band", epikv.band_policy)
register("epikv_seg", epikv.segment_policy)
register("infokv", infokv.policy)
register("retention", retention.policy)
OWN = frozenset(_REGISTRY)
