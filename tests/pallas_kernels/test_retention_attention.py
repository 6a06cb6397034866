"""retention_attention: reference against numpy, kernels and CPU form against it with gradients, slices of queries, schedules, checks by name, traffic."""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.retention_attention import bench, cases, gpu, reference, retention_attention, tpu, xla
from pallas_kernels.retention_attention.cases import REAL, SMALL, Case
from pallas_kernels.retention_attention.common import document_bounds, of_queries
from tests.pallas_kernels import races

FORMS = {
    "xla": xla.retention_attention,
    "tpu": functools.partial(tpu.retention_attention, interpret=True),
    "gpu": functools.partial(gpu.retention_attention, interpret=True),
}
NAMES = ("q", "k", "v", "log_beta")
# Most of the time goes into compiling what runs for milliseconds.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})


def by_hand(q, k, v, log_beta, segment_ids, start):
    """out and mass in float64, one query at a time."""
    q, k, v, log_beta = (np.asarray(x, np.float64) for x in (q, k, v, log_beta))
    out, mass = np.zeros(q.shape), np.zeros(q.shape[:3])
    for b, n, h in np.ndindex(*mass.shape):
        first = t = n + int(start or 0)
        while first > 0 and (segment_ids is None or segment_ids[b, first - 1] == segment_ids[b, t]):
            first -= 1
        bias = np.array([(t - i) * log_beta[b, i, h] for i in range(first, t + 1)])
        mass[b, n, h] = sum(math.exp(x) for x in bias)
        for g in range(q.shape[3]):
            logits = k[b, first : t + 1, h] @ q[b, n, h, g] / math.sqrt(q.shape[-1]) + bias
            weights = np.exp(logits - logits.max())
            out[b, n, h, g] = weights / weights.sum() @ v[b, first : t + 1, h]
    return out, mass


def loss_weights(q):
    """What the loss multiplies out and mass by."""
    random = np.random.default_rng(7)
    return jnp.asarray(random.normal(size=q.shape), jnp.float32), jnp.asarray(random.normal(size=q.shape[:3]), jnp.float32)


def weighted(attention):
    """The function (arguments, weights) -> out, mass and the gradients of their weighted sum, by name."""

    def function(given, weights):
        def loss(inputs):
            out, mass = attention(**{**given, **inputs})
            return jnp.sum(out.astype(jnp.float32) * weights[0]) + jnp.sum(mass * weights[1]), (out, mass)

        inputs = {name: given[name] for name in NAMES if given[name] is not None}
        (_, (out, mass)), gradients = jax.value_and_grad(loss, has_aux=True)(inputs)
        return {"out": out, "mass": mass, **gradients}

    return jit(function)


def value_and_gradients(attention, given):
    return weighted(attention)(given, loss_weights(given["q"]))


@functools.cache
def expected(case: Case):
    return value_and_gradients(reference.retention_attention, cases.arrays(case))


def assert_close(got, want, dtype):
    """Largest difference over largest entry: 1e-4 in float32, 2e-2 in bfloat16; float32 results of bfloat16 inputs are held to the stricter one."""
    assert got.keys() == want.keys()
    for name, b in want.items():
        a, b = np.asarray(got[name], np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and got[name].dtype == want[name].dtype, name
        assert np.all(np.isfinite(a)), name
        allowed = 2e-2 if dtype == "bfloat16" and name != "mass" else 1e-4
        # Where a query sees itself alone, gradients of q and k are 0, and what is left is rounding of terms of the size of 1.
        assert np.abs(a - b).max() <= allowed * max(np.abs(b).max(), 0.1), f"{name}: {np.abs(a - b).max()} of {np.abs(b).max()}"


BY_HAND = [
    Case(2, 13, 2, 2, 4, documents=((1, 5, 4), (12,))),
    Case(1, 9, 1, 1, 4),
    Case(1, 8, 1, 3, 4, forgetting="at once"),
    Case(2, 13, 1, 2, 4, documents=((1, 5, 4), (12,)), queries=(5, 11)),
]


@pytest.mark.parametrize("case", BY_HAND)
def test_reference_by_hand(case):
    given = cases.arrays(case)
    out, mass = by_hand(**given)
    got = reference.retention_attention(**given)
    np.testing.assert_allclose(got[0], out, atol=2e-6)
    np.testing.assert_allclose(got[1], mass, rtol=2e-6)
    assert case.queries or mass[0, 0, 0] == 1.0


def test_ids_that_come_again_are_another_document():
    ids = jnp.array([[5, 5, 3, 3, 3, 5], [1, 2, 1, 2, 1, 1]])
    assert reference.first_of_document(ids, (2, 6)).tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 2, 3, 4, 4]]
    assert reference.last_of_document(ids, (2, 6)).tolist() == [[1, 1, 4, 4, 4, 5], [0, 1, 2, 3, 5, 5]]
    assert reference.first_of_document(None, (1, 3)).tolist() == [[0, 0, 0]] and reference.last_of_document(None, (1, 3)).tolist() == [[2, 2, 2]]


# What the CPU form tells apart is fewer: it has no tiles to skip.
CPU_CASES = ("one token", "two rows", "three heads a group", "at once", "plain documents", "a slice's documents", "a plain slice")


@pytest.mark.parametrize("name, form", [(name, form) for name in SMALL for form in FORMS if form != "xla" or name in CPU_CASES])
def test_small(name, form):
    assert_close(value_and_gradients(FORMS[form], cases.arrays(SMALL[name])), expected(SMALL[name]), SMALL[name].dtype)


MANY_TILES = Case(2, 500, 1, 2, 32, documents=((3, 1, 300, 40), (499,)))


def test_tpu_many_tiles(monkeypatch):
    """One sequence takes far fewer steps than the other, and rows begin with tiles in which they see nothing."""
    monkeypatch.setattr(tpu, "blocks", lambda *_: (512, 128, 128))
    assert_close(value_and_gradients(FORMS["tpu"], cases.arrays(MANY_TILES)), expected(MANY_TILES), "float32")


SLICES = [
    Case(2, 600, 1, 2, 16, documents=((130, 1, 300), (450, 149))),
    Case(1, 600, 2, 3, 16),
    Case(1, 600, 1, 1, 16, documents=((130, 1, 300),), forgetting=None),
    Case(1, 600, 1, 1, 16, forgetting=None),
]


@pytest.mark.parametrize("case", SLICES, ids=["documents", "one document", "plain documents", "plain"])
@pytest.mark.parametrize("form, count", [("reference", 2), ("xla", 2), ("tpu", 4), ("gpu", 4)])
def test_slices_are_the_whole(monkeypatch, form, count, case):
    """Slices of the queries, whose start is traced, have the whole's results side by side, and gradients of keys that add up to the whole's."""
    monkeypatch.setattr(tpu, "blocks", lambda *_: (640, 128, 128))
    attend = weighted({"reference": reference.retention_attention, **FORMS}[form])
    given, size = cases.arrays(case), case.length // count
    weights, parts = loss_weights(given["q"]), []
    for start in range(0, case.length, size):
        own = slice(start, start + size)
        parts.append(attend({**given, "q": given["q"][:, own], "start": jnp.int32(start)}, [x[:, own] for x in weights]))
        for name in parts[-1].keys() & {"k", "v", "log_beta"}:
            assert not np.any(parts[-1][name][:, start + size :]), f"keys behind the last query have a gradient of {name}"
    side_by_side = ("out", "mass", "q")
    got = {name: jnp.concatenate([part[name] for part in parts], axis=1) if name in side_by_side else sum(part[name] for part in parts) for name in parts[0]}
    assert_close(got, expected(case), "float32")


@pytest.mark.parametrize("form", FORMS)
def test_whole_slice_has_no_start(form):
    """As many queries as keys: the program does not look at start, and so is the one without it."""
    given = cases.shapes(Case(1, 300, 1, 2, 32))
    program = jax.make_jaxpr(FORMS[form])(*(given[name] for name in NAMES), None, jnp.int32(0)).jaxpr
    assert not any(x is program.invars[-1] for equation in program.eqns for x in equation.invars)


def test_tpu_races(monkeypatch):
    monkeypatch.setattr(tpu, "blocks", lambda *_: (256, 128, 128))
    case = Case(2, 200, 1, 2, 32, documents=((150,), (1, 130)))
    with races.none_found() as params:
        got = value_and_gradients(functools.partial(tpu.retention_attention, interpret=params), cases.arrays(case))
        assert_close(got, expected(case), "float32")


def test_a_schedule_that_a_tpu_cannot_be_told_is_named():
    """At its tiles: 128K tokens of two rows compile, and of four do not."""
    for rows, fits in ((2, True), (4, False)):
        first = jax.ShapeDtypeStruct((rows, 128 * 1024), jnp.int32)

        def plan(first):
            return tpu.queries_schedule(first, 128 * 1024, 128, 1024)[0]

        if fits:
            assert jax.eval_shape(plan, first).size * 4 <= 2**20
        else:
            with pytest.raises(ValueError, match="4 rows a device, of which each takes 66048 blocks .* split rows or tokens over more devices"):
                jax.eval_shape(plan, first)


@pytest.mark.parametrize("documents", [None, ((3, 1, 300, 40), (511, 2), (128, 128, 256))])
@pytest.mark.parametrize("start", [None, 0, 200, 640])
@pytest.mark.parametrize("queries, keys", [(128, 128), (128, 512)])
def test_schedule(documents, start, queries, keys):
    """Every tile with anything visible once, and no other; masks where anything is hidden; FIRST and LAST around each block, a step for each."""
    length, count = 1024, 1024 if start is None else 384
    case = Case(3, length, 1, 1, 8, documents=documents)
    ids = cases.segment_ids(case)
    first, last = document_bounds(None if ids is None else jnp.asarray(ids), 3, length, length)
    first = of_queries(first, start, count)
    index = np.arange(length)
    time = np.arange(count) + (start or 0)
    visible = (time[:, None] >= index) & (index >= np.asarray(first)[:, :, None])
    tiles = visible.reshape(3, count // queries, queries, length // keys, keys).transpose(0, 1, 3, 2, 4)
    anything, everything = tiles.any(axis=(3, 4)), tiles.all(axis=(3, 4))
    traced = None if start is None else jnp.int32(start)
    plans = tpu.queries_schedule(first, length, queries, keys, traced), tpu.keys_schedule(last, count, queries, keys, traced)
    for plan, of_keys in zip(plans, (False, True), strict=True):
        words, steps, most = (np.asarray(x) for x in plan)
        taken = np.maximum(anything.sum(axis=1 if of_keys else 2), 1).sum(axis=1)
        assert steps == taken.max() <= most
        for b, row in enumerate(words.reshape(3, most)):
            for flag in (tpu.FIRST, tpu.LAST):
                np.testing.assert_array_equal(tpu.own(row[row & flag != 0]), np.arange(len(anything[b].T if of_keys else anything[b])))
            assert np.all(np.diff(tpu.own(row)) >= 0) and np.all(tpu.other(row) < len(anything[b] if of_keys else anything[b].T))
            alive = row[row & tpu.LIVE != 0]
            own, other = tpu.own(alive), tpu.other(alive)
            at = (other, own) if of_keys else (own, other)
            met = np.zeros(anything[b].shape, int)
            np.add.at(met, at, 1)
            np.testing.assert_array_equal(met, anything[b])
            np.testing.assert_array_equal(alive & tpu.MASKED == 0, everything[b][at])
            np.testing.assert_array_equal(alive & tpu.FIRST != 0, np.diff(own, prepend=-1) != 0)
            np.testing.assert_array_equal(alive & tpu.LAST != 0, np.diff(own, append=-1) != 0)
            # A sequence that is done stays where it is and does nothing.
            assert np.all(row[taken[b] :] == row[taken[b] - 1] & ~15)


@pytest.mark.parametrize("start, count", [(0, 384), (0, 128), (97, 128), (256, 128)])
@pytest.mark.parametrize("rows, group, keys", [(128, 4, 64), (128, 3, 32), (64, 1, 128), (32, 8, 32)])
def test_gpu_loops(rows, group, keys, start, count):
    """Either kernel's two loops meet each tile with anything visible once, and mask those with anything hidden."""
    length, tokens = 384, rows // group
    ids = jnp.asarray(cases.segment_ids(Case(1, length, 1, 1, 8, documents=((100, 1, 130),))))
    first, last = (x[0] for x in document_bounds(ids, 1, length, length))
    first = first[start : start + count]
    time, index = np.arange(start, start + count), np.arange(length)
    visible = (time[:, None] >= index) & (index >= np.asarray(first)[:, None])

    def tile(masked, i, met):
        return met.at[i].add(2 if masked else 1)

    @jit
    @jax.vmap
    def by_queries(begin):
        seen = gpu.keys_seen(begin, jnp.minimum(begin + tokens, count), first, keys, length, start)
        return gpu.two_loops(*seen, tile, jnp.zeros(length // keys, jnp.int32))

    @jit
    @jax.vmap
    def by_keys(begin):
        return gpu.two_loops(*gpu.queries_seeing(begin, keys, last, count, tokens, start), tile, jnp.zeros(-(-count // tokens), jnp.int32))

    blocks = [np.arange(0, n, size) for n, size in ((count, tokens), (length, keys))]
    anything, everything = (np.array([[f(visible[i : i + tokens, j : j + keys]) for j in blocks[1]] for i in blocks[0]]) for f in (np.any, np.all))
    for met in (np.asarray(by_queries(blocks[0])), np.asarray(by_keys(blocks[1])).T):
        np.testing.assert_array_equal(met > 0, anything)
        assert met.max() <= 2 and np.all(everything[met == 1])
        # Only a block at T's end, which may be a short one, is masked without need.
        np.testing.assert_array_equal((met == 1)[:-1], everything[:-1])


def test_public_function_is_traced_and_differentiated_anywhere():
    """In a scan, rematerialised and batched, as a model does it."""
    given = cases.arrays(Case(1, 40, 2, 2, 16, documents=((7,),)))

    def loss(inputs):
        attend = jax.checkpoint(lambda q: retention_attention(q, inputs["k"], inputs["v"], inputs["log_beta"], given["segment_ids"]))
        _, (out, mass) = jax.lax.scan(lambda carry, q: (carry, attend(q)), 0, jnp.stack([inputs["q"], 2 * inputs["q"]]))
        return jnp.sum(out[1] ** 2) + jnp.sum(mass[0] ** 2)

    def plain_loss(inputs):
        out, mass = reference.retention_attention(2 * inputs["q"], inputs["k"], inputs["v"], inputs["log_beta"], given["segment_ids"])
        return jnp.sum(out**2) + jnp.sum(mass**2)

    inputs = {name: given[name] for name in NAMES}
    assert_close(jit(jax.grad(loss))(inputs), jit(jax.grad(plain_loss))(inputs), "float32")


@pytest.mark.parametrize("form", ["tpu", "gpu"])
def test_nothing_is_quadratic(form):
    """Forward and backward at T=128K hold no array larger than the queries."""
    case = REAL["Qwen3-4B T=128K"]
    given = cases.shapes(case)
    module = {"tpu": tpu, "gpu": gpu}[form]

    def loss(q, k, v, log_beta):
        out, mass = module.retention_attention(q, k, v, log_beta)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(mass)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (math.prod(v.aval.shape) for v in equation.outvars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(*(given[name] for name in NAMES))
    assert max(sizes(jaxpr.jaxpr)) == math.prod(given["q"].shape)


BAD = [
    ({"q": jnp.zeros((2, 3, 4, 5))}, r"q has shape \(2, 3, 4, 5\).*\[B,Tq,H,G,D\]"),
    ({"q": jnp.zeros((2, 6, 2, 0, 4))}, "q has shape"),
    ({"q": jnp.zeros((2, 6, 2, 2, 4), jnp.float16)}, "q has dtype float16.*bfloat16"),
    ({"k": jnp.zeros((2, 6, 1, 4))}, r"k has shape \(2, 6, 1, 4\).*\(2, 6, 2, 4\)"),
    ({"v": jnp.zeros((2, 5, 2, 4))}, "v has shape"),
    ({"v": jnp.zeros((2, 6, 2, 4), jnp.bfloat16)}, "v has dtype bfloat16.*float32"),
    ({"log_beta": jnp.zeros((2, 6, 2, 1))}, r"log_beta has shape.*\[B,T,H\]"),
    ({"log_beta": jnp.zeros((2, 6, 2), jnp.bfloat16)}, "log_beta has dtype bfloat16"),
    ({"log_beta": jnp.full((2, 6, 2), 1e-3)}, "log_beta holds"),
    ({"log_beta": jnp.full((2, 6, 2), -jnp.inf)}, "log_beta holds"),
    ({"log_beta": jnp.full((2, 6, 2), jnp.nan)}, "log_beta holds"),
    ({"segment_ids": jnp.zeros((6,), jnp.int32)}, r"segment_ids has shape \(6,\).*\(2, 6\)"),
    ({"segment_ids": jnp.zeros((2, 6))}, "segment_ids has dtype float32"),
    ({"q": jnp.zeros((2, 4, 2, 2, 4))}, r"k has shape \(2, 6, 2, 4\).*\(2, 4, 2, 4\), or with start"),
    ({"q": jnp.zeros((2, 8, 2, 2, 4)), "start": 0}, r"k has shape \(2, 6, 2, 4\).*\(2, 8, 2, 4\)$"),
    ({"q": jnp.zeros((2, 4, 2, 2, 4)), "start": 3}, "start is 3: 4 queries among 6 tokens must start at 0 to 2"),
    ({"q": jnp.zeros((2, 4, 2, 2, 4)), "start": jnp.int32(-1)}, "start is -1"),
    ({"start": 1}, "start is 1.*0 to 0"),
    ({"start": 0.0}, "start has shape .* float32"),
    ({"start": jnp.zeros(2, jnp.int32)}, r"start has shape \(2,\)"),
    ({"implementation": "triton"}, "implementation is 'triton'.*'gpu'"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        retention_attention(**{**cases.arrays(Case(2, 6, 2, 2, 4)), **change})


def test_shapes_are_those_of_arrays():
    for case in SMALL.values():
        described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cases.arrays(case))
        assert described == cases.shapes(case)


@pytest.mark.parametrize("target, flops_per_byte", [("v5e", 1000), ("h100", 140)])
def test_traffic(target, flops_per_byte):
    """Enough arithmetic for each byte to keep the matrix units busy: 240 on a v5e, 560 on a v6e, and on an H100 some 140 from its level-2 cache."""
    case = Case(1, 32_768, 8, 4, 128, "bfloat16")
    fewest, moved = bench.traffic(case, target)
    assert fewest == 32_768 * 8 * 128 * 2 * 30 < moved < bench.flops(case) / flops_per_byte
    packed = bench.traffic(Case(1, 32_768, 8, 4, 128, "bfloat16", documents=((4096,) * 7,)), target)
    assert packed[0] == fewest and (packed[1] - fewest) < (moved - fewest) / 4, "other documents are fetched"
