"""A name that is not known is answered with the nearest that are; what a whole number is."""

import difflib
import numbers
from collections.abc import Collection


def check_name(kind: str, name: str, known: Collection[str]) -> None:
    """Raises ValueError, in one sentence with the nearest names and all, unless `name`, the name of a `kind`, is known."""
    if name not in known:
        near = difflib.get_close_matches(name, known)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown {kind} {name!r}: {hint}known are {', '.join(known)}")


def is_whole(value, least: int = 0) -> bool:
    """Whether `value` is a whole number, numpy's too, of at least `least`; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least
