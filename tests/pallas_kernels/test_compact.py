import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compact import bench, cases, compact, gpu, reference, tpu
from tests.pallas_kernels import races

# They take seconds to compile and milliseconds to run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def in_blocks(rows):
    """The TPU kernel with blocks of so many rows of a small case, of which there are several then."""

    def compact(pool, buffer, destinations, interpret=True):
        row = -(-pool.keys.shape[2] // 128) * 128 * pool.keys.dtype.itemsize
        with mock.patch.object(tpu, "BLOCK_BYTES", rows * row):
            return tpu.compact(pool, buffer, destinations, interpret=interpret)

    return compact


FORMS = {
    "reference": jit(reference.compact),
    "tpu": jit(in_blocks(1024)),
    "tpu, small blocks": jit(in_blocks(128)),
    "tpu, blocks of two groups": jit(in_blocks(256)),
    "gpu": jit(functools.partial(gpu.compact, interpret=True)),
}


def bits(x):
    """What x holds, bit for bit."""
    return np.asarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def assert_moved(case, given, out):
    """Every kept entry, one at a time, lies where its destination says."""
    slots, width = case.slots, case.width
    for row, goes in enumerate(np.asarray(given["destinations"])):
        old = np.flatnonzero(goes[:slots] < slots)
        new = slots + np.flatnonzero(goes[slots:] < slots)
        stream, token = np.divmod(new - slots, width)
        layer, head = np.divmod(stream, case.heads)
        for name in reference.Pool._fields:
            made, pool, buffer = (bits(getattr(x, name)) for x in (out, given["pool"], given["buffer"]))
            np.testing.assert_array_equal(made[row, goes[old]], pool[row, old], err_msg=name)
            wanted = buffer[row, token] if name == "position" else buffer[layer, row, head, token]
            np.testing.assert_array_equal(made[row, goes[new]], wanted, err_msg=name)


RUNS = [(form, name) for form in ("reference", "tpu, small blocks", "gpu") for name in cases.SMALL]
RUNS += [("tpu", "grow and shrink"), ("tpu", "one swallows all"), ("tpu, blocks of two groups", "both ways inside a stream")]


@pytest.mark.parametrize("form, name", RUNS)
def test_every_kept_entry_arrives_bit_for_bit(form, name):
    given = cases.arrays(cases.SMALL[name])
    assert_moved(cases.SMALL[name], given, FORMS[form](**given))


def test_random_selections():
    case = cases.SMALL["grow and shrink"]
    random = np.random.default_rng(0)
    for seed in range(1, 9):
        lengths = [np.diff(np.sort([0, *random.integers(0, case.slots, case.layers * case.heads - 1), case.slots])) for _ in case.segments]
        kept = tuple(map(tuple, random.choice([0.0, 0.2, 0.7, 1.0], (6, 2))))
        drawn = dataclasses.replace(case, segments=tuple(tuple(map(int, x)) for x in lengths), kept=kept)
        given = cases.arrays(drawn, seed)
        assert_moved(drawn, given, FORMS["tpu, small blocks"](**given))


@pytest.mark.parametrize("name", ["one slot", "both ways inside a stream"])
def test_tpu_kernel_has_no_races(name):
    given = cases.arrays(cases.SMALL[name])
    with races.none_found() as params:
        assert_moved(cases.SMALL[name], given, in_blocks(128)(**given, interpret=params))


def test_tpu_refuses_rows_that_end_inside_a_column():
    case = dataclasses.replace(cases.SMALL["one slot"], dim=192)
    with pytest.raises(ValueError, match="rows of 192: on a TPU up to 128, or a multiple"):
        compact(**cases.arrays(case), implementation="tpu")


# Where dropped entries lie among kept ones they are read too: a quarter more if a third is dropped.
@pytest.mark.parametrize("name, most", [("M=512 W=64 B=1", 1.15), ("M=512 W=256 B=1", 1.35), ("M=4096 W=256 B=1", 1.1)])
def test_little_more_is_moved_than_must_be(name, most):
    for target, limit in (("v5e", most), ("h100", 1.05)):
        fewest, moved = bench.traffic(cases.REAL[f"Qwen3-4B/8B {name}"], target)
        assert 1 <= moved / fewest < limit


def test_what_stays_in_place_is_not_moved():
    fewest, moved = bench.traffic(cases.SMALL["nothing changes"], "v5e")
    assert fewest == moved == 0


def in_pool(field, change):
    return lambda given: {**given, "pool": given["pool"]._replace(**{field: change(getattr(given["pool"], field))})}


def in_buffer(field, change):
    return lambda given: {**given, "buffer": given["buffer"]._replace(**{field: change(getattr(given["buffer"], field))})}


def destinations(change):
    return lambda given: {**given, "destinations": change(given["destinations"])}


WRONG = {
    "dtype": (in_pool("keys", lambda x: x.astype(jnp.float16)), "pool.keys is float16: bfloat16 and float32 work"),
    "values": (in_pool("values", lambda x: x[:, 1:]), r"pool.values is float32\[1, 1899, 64\]"),
    "stat": (in_pool("stat", lambda x: x.astype(jnp.bfloat16)), "pool.stat is bfloat16"),
    "position": (in_buffer("position", lambda x: x[:, 1:]), r"buffer.position is int32\[1, 119\].* must be int32\[1, 120\]"),
    "empty": (in_buffer("keys", lambda x: x[:, :, :, :0]), "none may be 0"),
    "length": (destinations(lambda x: x[:, 1:]), r"destinations is int32\[1, 2619\].* must be int32\[1, 2620\]"),
    "order": (destinations(lambda x: x[:, ::-1]), "destinations must rise"),
    "hole": (destinations(lambda x: jnp.where(x == 3, 1900, x)), "destinations must rise .* be together 0..n-1"),
    "implementation": (lambda given: {**given, "implementation": "cuda"}, "implementation is 'cuda': None and 'cpu', 'tpu', 'gpu' work"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_named(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        compact(**change(cases.arrays(cases.SMALL["nothing dropped"])))
