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


def test_of_many_names_only_the_nearest_are_said():
    many = [f"task_{i}" for i in range(names.FEW)] + ["window"]
    with pytest.raises(ValueError, match=r"^unknown task 'windw': did you mean window\?$"):
        names.check_name("task", "windw", many)
    with pytest.raises(ValueError, match="^unknown task 'xyz': known are task_0, .*, window$"):
        names.check_name("task", "xyz", many)


def test_numbers():
    assert names.is_whole(np.int32(3), 3) and not any(names.is_whole(one, 3) for one in (2, 3.0, "3", True, None))
    assert names.is_positive(np.float32(0.5)) and names.is_positive(3)
    assert not any(names.is_positive(one) for one in (0, -1.0, math.inf, math.nan, "3", True, None))
