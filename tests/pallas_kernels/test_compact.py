import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compact import cases, compact, gpu, reference, tpu

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


@pytest.mark.parametrize("name", cases.SMALL)
@pytest.mark.parametrize("form", FORMS)
def test_every_kept_entry_arrives_bit_for_bit(form, name):
    case = cases.SMALL[name]
    given = cases.arrays(case)
    assert_moved(case, given, FORMS[form](**given))


def test_random_selections():
    case = cases.SMALL["grow and shrink"]
    for seed in range(1, 4):
        given = cases.arrays(case, seed)
        assert_moved(case, given, FORMS["tpu"](**given))


@pytest.mark.parametrize("name", ["one slot", "both ways inside a stream"])
def test_tpu_kernel_has_no_races(name):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
    case = cases.SMALL[name]
    given = cases.arrays(case)
    assert_moved(case, given, tpu.compact(**given, interpret=params))
    assert not interpret_pallas_call.races.races_found


def in_pool(field, change):
    return lambda given: {**given, "pool": given["pool"]._replace(**{field: change(getattr(given["pool"], field))})}


def in_buffer(field, change):
    return lambda given: {**given, "buffer": given["buffer"]._replace(**{field: change(getattr(given["buffer"], field))})}


def destinations(change):
    return lambda given: {**given, "destinations": change(given["destinations"])}


WRONG = {
    "dtype": (in_pool("keys", lambda x: x.astype(jnp.float16)), "pool.keys is float16: bfloat16 and float32 work"),
    "values": (in_pool("values", lambda x: x[:, 1:]), r"pool.values is float32\[1, 299, 128\]"),
    "stat": (in_pool("stat", lambda x: x.astype(jnp.bfloat16)), "pool.stat is bfloat16"),
    "position": (in_buffer("position", lambda x: x[:, 1:]), r"buffer.position is int32\[1, 15\].* must be int32\[1, 16\]"),
    "empty": (in_buffer("keys", lambda x: x[:, :, :, :0]), "none may be 0"),
    "length": (destinations(lambda x: x[:, 1:]), r"destinations is int32\[1, 363\].* must be int32\[1, 364\]"),
    "order": (destinations(lambda x: x[:, ::-1]), "destinations must rise"),
    "hole": (destinations(lambda x: jnp.where(x == 3, 300, x)), "destinations must rise .* be together 0..n-1"),
    "implementation": (lambda given: {**given, "implementation": "cuda"}, "implementation is 'cuda': None and 'cpu', 'tpu', 'gpu' work"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_named(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        compact(**change(cases.arrays(cases.SMALL["nothing dropped"])))
