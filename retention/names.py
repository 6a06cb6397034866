"""A name that is not known is answered with the nearest that are; what a whole number is, and any number above 0."""

import difflib
import math
import numbers
from collections.abc import Collection


def check_name(kind: str, name: str, known: Collection[str]) -> None:
    """Raises ValueError, in one sentence with the nearest names and all, unless `name`, the name of a `kind`, is known."""
    text = isinstance(name, str)
    if not text or name not in known:
        near = difflib.get_close_matches(name, known) if text else []
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown {kind} {name!r}: {hint}known are {', '.join(known)}")


def is_whole(value, least: int = 0) -> bool:
    """Whether `value` is a whole number, numpy's too, of at least `least`; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least


def is_positive(value) -> bool:
    """Whether `value` is a finite number above 0; True is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < value < math.inf
