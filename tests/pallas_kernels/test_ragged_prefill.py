import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_prefill import bench, cases, gpu, ragged_prefill, reference, tpu, xla
from tests.pallas_kernels import races

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
# They take seconds to compile and milliseconds to run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
FORMS = {
    "tpu": jit(functools.partial(tpu.ragged_prefill, interpret=True)),
    "gpu": jit(functools.partial(gpu.ragged_prefill, interpret=True)),
    "cpu": jit(xla.ragged_prefill),
}


@functools.cache
def expected(name):
    return np.asarray(jit(reference.ragged_prefill)(**cases.arrays(cases.SMALL[name])), np.float32)


def by_hand(case, given):
    """One query head of one query at a time, from the lists of what it sees."""
    given = {name: np.asarray(x, np.float64 if x.ndim > 2 else int) for name, x in given.items()}
    out = np.zeros(given["q"].shape)
    for b, valid in enumerate(case.valid):
        for h in range(case.heads):
            begin, end = given["starts"][b, case.layer * case.heads + h :][:2]
            kept = slice(begin, end)
            buffered = (case.layer, b, h, slice(case.buffered[b]))
            for t in range(valid):
                keys = [*given["pool_keys"][b, kept], *given["buffer_keys"][buffered], *given["k"][b, : t + 1, h]]
                values = [*given["pool_values"][b, kept], *given["buffer_values"][buffered], *given["v"][b, : t + 1, h]]
                for g in range(case.group):
                    weights = np.exp(np.array(keys) @ given["q"][b, t, h, g] / np.sqrt(case.dim))
                    out[b, t, h, g] = weights @ np.array(values) / weights.sum()
    return out


@pytest.mark.parametrize("name", ["one token", "smaller than a tile", "unequal batch"])
def test_reference_is_the_definition(name):
    case = cases.SMALL[name]
    np.testing.assert_allclose(expected(name), by_hand(case, cases.arrays(case)), atol=TOLERANCE[case.dtype])


@pytest.mark.parametrize("name", cases.SMALL)
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_the_reference(form, name):
    case = cases.SMALL[name]
    out = FORMS[form](**cases.arrays(case))
    assert out.dtype == case.dtype
    out = np.asarray(out, np.float32)
    np.testing.assert_allclose(out, expected(name), atol=TOLERANCE[case.dtype])
    for row, valid in enumerate(case.valid):
        assert not out[row, valid:].any(), "padding must come out as zeros"


@pytest.mark.parametrize("form", FORMS)
def test_other_layers_do_not_matter(form):
    case = cases.SMALL["unequal batch"]
    given = {name: np.array(x) for name, x in cases.arrays(case).items()}
    for name in ("keys", "values"):
        given[f"buffer_{name}"][: case.layer] = np.nan
        for pool, starts in zip(given[f"pool_{name}"], given["starts"], strict=True):
            pool[: starts[case.layer * case.heads]] = np.nan
    np.testing.assert_allclose(np.asarray(FORMS[form](**given), np.float32), expected("unequal batch"), atol=TOLERANCE[case.dtype])


@pytest.mark.parametrize("name", ["smaller than a tile", "blocks moved back"])
def test_tpu_kernel_has_no_races(name):
    case = cases.SMALL[name]
    with races.none_found() as params:
        out = tpu.ragged_prefill(**cases.arrays(case), interpret=params)
        np.testing.assert_allclose(np.asarray(out, np.float32), expected(name), atol=TOLERANCE[case.dtype])


def test_fetches_begin_at_whole_tiles():
    # Interpret mode would fetch from anywhere.
    for part in tpu.parts(slots=1403, width=700, length=600, dim=64, dtype="bfloat16") + tpu.parts(1403, 700, 600, 128, "bfloat16"):
        for begin in range(0, part.entries, 37):
            begin, end, count = part.touched(part.offset + begin, part.offset + part.entries)
            rows = [[int(x) for x in part.place(i, begin)] for i in range(int(count))]
            assert all(at % part.tile == 0 and 0 <= at <= part.entries - part.block for at, _ in rows)
            assert rows[0][1] == begin and rows[-1][0] + part.block >= end
            assert all(at + part.block >= following for (at, _), (_, following) in zip(rows, rows[1:], strict=False))


def test_layer_may_come_from_a_scan():
    case = dataclasses.replace(cases.SMALL["unequal batch"], layers=3, slots=1300)
    given = cases.arrays(case)

    @jax.jit
    def attend_all(given):
        return jax.lax.scan(lambda _, layer: (None, ragged_prefill(**{**given, "layer": layer})), None, jnp.arange(3, dtype=jnp.int32))[1]

    for layer, out in enumerate(attend_all(given)):
        wanted = ragged_prefill(**{**given, "layer": layer}, implementation="reference")
        np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(wanted, np.float32), atol=2e-2)


def test_cpu_takes_chunks_of_several_tiles():
    case = cases.Case(1, 1, 2, 16, 600, 300, 7, (600, 300, 129, 0), (7, 0, 3, 1), segments=((300,), (0,), (129,), (1,)), dtype="float32")
    given = cases.arrays(case)
    np.testing.assert_allclose(ragged_prefill(**given), ragged_prefill(**given, implementation="reference"), atol=2e-6)


WRONG = {
    "q": (lambda q: q[0], "q .B,T,H,G,D."),
    "q ": (lambda q: q[:, :0], "a chunk has at least one token"),
    "q  ": (lambda q: q.astype(jnp.float16), "q is float16: bfloat16 and float32 work"),
    "k": (lambda k: k[:, 1:], r"k is float32\[2, 2, 1, 8\].* it must be float32\[2, 3, 1, 8\]"),
    "v": (lambda v: v.astype(jnp.bfloat16), "v is bfloat16"),
    "pool_keys": (lambda x: x[:1], "pool_keys is"),
    "pool_values": (lambda x: x[:, :1], "pool_values is"),
    "buffer_keys": (lambda x: x[:, :, :, :0], "buffer_keys has the shape .* at least one token"),
    "buffer_values": (lambda x: x[..., :4], "buffer_values is"),
    "valid": (lambda x: x + 1, r"valid lies in 3..4: it must lie in 0..3"),
    "buffered": (lambda x: x - 1, r"buffered lies in -1..2: it must lie in 0..3"),
    "starts": (lambda x: x[:, :-1], r"starts is int32\[2, 2\]: it must be int32\[2, 3\]"),
    "starts ": (lambda x: x + 1, r"starts lies in 1..6: it must lie in 0..5"),
    "starts  ": (lambda x: x[:, ::-1], "starts falls along a row"),
    "layer": (lambda x: x + 1, r"layer lies in 2..2: it must lie in 0..1"),
    "layer ": (lambda x: x.astype(jnp.float32), r"layer is float32\[\]: it must be int32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_named(name):
    change, message = WRONG[name]
    given = cases.arrays(cases.SMALL["smaller than a tile"])
    with pytest.raises(ValueError, match=message):
        ragged_prefill(**{**given, name.strip(): change(given[name.strip()])})


def test_a_head_dimension_that_fills_no_lanes_is_named():
    given = cases.arrays(dataclasses.replace(cases.SMALL["one token"], dim=192))
    with pytest.raises(ValueError, match="q has rows of 192: on a TPU up to 128, or a multiple of it, would work"):
        tpu.ragged_prefill(**given, interpret=True)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="implementation is 'cuda': None and 'reference', 'cpu', 'tpu', 'gpu' work"):
        ragged_prefill(**cases.arrays(cases.SMALL["one token"]), implementation="cuda")


def test_traffic_is_what_a_count_by_hand_gives():
    # Rows of 256 bytes, 2 kv heads. q and out: 64 * 4 rows each; k and v: 64 rows each; keys and values cached: 256 + 64 entries each.
    case = cases.SMALL["pool and buffer full"]
    fewest, moved = bench.traffic(case, "v5e")
    assert fewest == 256 * (2 * 2 * 64 * 4 + 2 * 2 * 64 + 2 * 2 * (256 + 64))
    # The chunk is padded to 128 keys. One segment takes half a block of 512; the other, at the pool's end, one that is moved back to there.
    assert moved == 256 * (2 * 2 * 64 * 4 + 2 * 2 * 128 + 2 * (256 + 512) + 2 * 2 * 64)


def test_traffic_follows_what_is_seen():
    case = cases.REAL["Qwen3-4B/8B T=256 M=4096 B=8"]
    for target, most in (("v5e", 1.1), ("h100", 6.0)):
        fewest, moved = bench.traffic(case, target)
        assert fewest <= moved <= most * fewest
        padding = dataclasses.replace(case, valid=(0,) * 8)
        _, idle = bench.traffic(padding, target)
        assert idle < 0.3 * moved
    fewest, moved = bench.traffic(cases.REAL["Qwen3-4B/8B T=256 full cache of 32K"], "v5e")
    assert moved <= 1.01 * fewest
