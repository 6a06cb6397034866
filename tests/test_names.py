"""What is no name, no whole number and no number above 0."""

import math

import numpy as np
import pytest

from retention import names


@pytest.mark.parametrize(
    "name, message",
    [
        ("globl", "unknown scope 'globl': did you mean global. known are global, head"),
        (3, "unknown scope 3: known are global, head"),
        (["head"], r"unknown scope \['head'\]: known are"),
        (None, "unknown scope None: known are"),
    ],
)
def test_unknown_names(name, message):
    for known in (("global", "head"), {"global": 1, "head": 2}):
        names.check_name("scope", "head", known)
        with pytest.raises(ValueError, match=message):
            names.check_name("scope", name, known)


def test_numbers():
    assert names.is_whole(np.int32(3), 3) and not any(names.is_whole(one, 3) for one in (2, 3.0, "3", True, None))
    assert names.is_positive(np.float32(0.5)) and names.is_positive(3)
    assert not any(names.is_positive(one) for one in (0, -1.0, math.inf, math.nan, "3", True, None))
