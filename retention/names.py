"""A name that is not known is answered with the nearest that are; what a whole number is, any number above 0, and a seed."""

import difflib
import math
import numbers
from collections.abc import Collection, Mapping

FEW = 20  # names that a sentence can hold beside the nearest


def check_name(kind: str, name: str, known: Collection[str]) -> None:
    """Raises ValueError, in one sentence with the nearest names, and all if none is near or they are few, unless `name`, of a `kind`, is known."""
    text = isinstance(name, str)
    if not text or name not in known:
        near = difflib.get_close_matches(name, known) if text else []
        hints = [f"did you mean {' or '.join(near)}?"] if near else []
        if not near or len(known) <= FEW:
            hints.append(f"known are {', '.join(known)}")
        raise ValueError(f"unknown {kind} {name!r}: {' '.join(hints)}")


def is_whole(value, least: int = 0) -> bool:
    """Whether `value` is a whole number, numpy's too, of at least `least`; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least


def is_positive(value) -> bool:
    """Whether `value` is a finite number above 0; True is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < value < math.inf


def check_least(config: Mapping, least: dict[str, int]) -> None:
    """Raises ValueError for an entry of the config, of those named in `least`, that is no whole number or less than its least."""
    for name, smallest in least.items():
        if not is_whole(config[name], smallest):
            raise ValueError(f"config.{name} must be a whole number of at least {smallest}, got {config[name]!r}")


def check_seed(seed) -> None:
    """Raises ValueError for what is no seed of a uint32."""
    if not is_whole(seed) or seed >= 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, got {seed!r}")


def whole_entry(file, key: str, value) -> int:
    """The value of a model file's entry, a whole number of at least 1. Raises ValueError for any other."""
    if not is_whole(value, 1):
        raise ValueError(f"{file} has {key} = {value!r}, which must be a whole number of at least 1")
    return value


def positive_entry(file, key: str, value) -> float:
    """The value of a model file's entry, a number above 0. Raises ValueError for any other."""
    if not is_positive(value):
        raise ValueError(f"{file} has {key} = {value!r}, which must be a number above 0")
    return value
