import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_decode import bench, cases, gpu, ragged_decode, reference, tpu, xla
from tests.pallas_kernels import races

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
FORMS = {
    "tpu": jax.jit(functools.partial(tpu.ragged_decode, interpret=True)),
    "tpu of two cores": jax.jit(functools.partial(tpu.ragged_decode, interpret=True, shares=2)),
    "gpu": jax.jit(functools.partial(gpu.ragged_decode, interpret=True)),
    "cpu": jax.jit(xla.ragged_decode),
}


@functools.cache
def expected(name):
    return np.asarray(jax.jit(reference.ragged_decode)(**cases.arrays(cases.SMALL[name])), np.float32)


def by_hand(case, given):
    """One query head at a time, from the lists of what it sees."""
    given = {name: np.asarray(x, np.float64 if x.ndim > 2 else int) for name, x in given.items()}
    out = np.zeros(given["q"].shape)
    for b, buffered in enumerate(case.buffered):
        for h in range(case.heads):
            begin, end = given["starts"][b, case.layer * case.heads + h :][:2]
            rows = (case.layer, b, h, slice(buffered))
            keys = np.array([*given["pool_keys"][b, begin:end], *given["buffer_keys"][rows], given["k"][b, h]])
            values = np.array([*given["pool_values"][b, begin:end], *given["buffer_values"][rows], given["v"][b, h]])
            for g in range(case.group):
                weights = np.exp(keys @ given["q"][b, h, g] / np.sqrt(case.dim))
                out[b, h, g] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("name", ["empty", "one entry each", "one huge stream", "unequal batch"])
def test_reference_is_the_definition(name):
    case = cases.SMALL[name]
    np.testing.assert_allclose(expected(name), by_hand(case, cases.arrays(case)), atol=TOLERANCE[case.dtype])


@pytest.mark.parametrize("name", cases.SMALL)
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_the_reference(form, name):
    case = cases.SMALL[name]
    out = FORMS[form](**cases.arrays(case))
    assert out.dtype == case.dtype
    np.testing.assert_allclose(np.asarray(out, np.float32), expected(name), atol=TOLERANCE[case.dtype])


@pytest.mark.parametrize("form", FORMS)
def test_logits_beyond_what_exp_can_hold(form):
    """Of hundreds, as a sharp head has them: no weight overflows, whichever part of the entries holds the largest."""
    given = cases.arrays(cases.SMALL["one huge stream"])
    for k in (given["k"], 5 * given["k"], -5 * given["k"]):
        sharp = given | {"q": 100 * given["q"], "k": k}
        wanted = reference.ragged_decode(**sharp)
        assert np.isfinite(wanted).all()
        np.testing.assert_allclose(FORMS[form](**sharp), wanted, atol=1e-3)


@pytest.mark.parametrize("name", ["one entry each", "dead tail in the last tile"])
def test_tpu_kernel_has_no_races(name):
    case = cases.SMALL[name]
    with races.none_found() as params:
        out = tpu.ragged_decode(**cases.arrays(case), interpret=params)
        np.testing.assert_allclose(np.asarray(out, np.float32), expected(name), atol=TOLERANCE[case.dtype])


def test_layer_may_come_from_a_scan():
    given = cases.arrays(cases.SMALL["unequal batch"])

    @jax.jit
    def attend_all(given):
        return jax.lax.scan(lambda _, layer: (None, ragged_decode(**{**given, "layer": layer})), None, jnp.arange(2, dtype=jnp.int32))[1]

    for layer, out in enumerate(attend_all(given)):
        wanted = ragged_decode(**{**given, "layer": layer}, implementation="reference")
        np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(wanted, np.float32), atol=2e-2)


WRONG = {
    "q": (lambda q: q[0], "q .B,H,G,D."),
    "q ": (lambda q: q.astype(jnp.float16), "q is float16: bfloat16 and float32 work"),
    "k": (lambda k: k[:, 1:], r"k is float32\[1, 1, 128\].* it must be float32\[1, 2, 128\]"),
    "v": (lambda v: v.astype(jnp.bfloat16), "v is bfloat16"),
    "pool_values": (lambda x: x[:, :1], "pool_values is"),
    "buffer_keys": (lambda x: x[:, :, :, :0], "buffer_keys has the shape .* at least one token"),
    "buffer_values": (lambda x: x[..., :4], "buffer_values is"),
    "buffered": (lambda x: x + 8, r"buffered lies in 9..9: it must lie in 0..8"),
    "starts": (lambda x: x[:, :-1], r"starts is int32\[1, 4\]: it must be int32\[1, 5\]"),
    "starts ": (lambda x: x[:, ::-1], "starts falls along a row"),
    "layer": (lambda x: x + 1, r"layer lies in 2..2: it must lie in 0..1"),
    "implementation": (lambda _: "cuda", "implementation is 'cuda': None and 'reference', 'cpu', 'tpu', 'gpu' work"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_named(name):
    change, message = WRONG[name]
    given = cases.arrays(cases.SMALL["one entry each"])
    with pytest.raises(ValueError, match=message):
        ragged_decode(**{**given, name.strip(): change(given.get(name.strip()))})


def test_traffic_is_what_a_count_by_hand_gives():
    # Rows of 256 bytes: two segments of 64 and two buffers of 32 entries, keys and values; q and out 8 rows, k and v 2 each. All of it is in whole tiles.
    fewest, moved = bench.traffic(cases.SMALL["pool and buffer full"], "v5e")
    assert fewest == 256 * (2 * (2 * 64 + 2 * 32) + 2 * 8 + 2 * 2)
    # The kernel takes k and v repeated for each query.
    assert moved == fewest + 256 * 2 * (8 - 2)


@pytest.mark.parametrize("name", cases.REAL)
@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_traffic_is_close_to_the_fewest(name, target):
    fewest, moved = bench.traffic(cases.REAL[name], target)
    assert fewest <= moved <= 1.15 * fewest
