"""global_topk: reference against numpy, kernels and XLA form against the reference, shards against the whole, checks by name, traffic."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.global_topk import bench, cases, global_topk, gpu, reference, select_keys, tpu, xla
from pallas_kernels.global_topk.cases import REAL, SMALL, SMALLEST, Case
from pallas_kernels.global_topk.reference import HIGHEST, LOWEST
from tests.pallas_kernels import races


def by_hand(scores, valid, protected, k, starts, width):
    """keep, counts, destinations and has_nan of each row, from sorted lists."""
    rows = []
    for score, live, fixed, limit, start in zip(*map(np.asarray, (scores, valid, protected, k, starts)), strict=True):
        entries, streams = len(score), len(start) - 1
        slots = entries - streams * width
        value = np.where(np.isnan(score), -np.inf, score)
        ranked = sorted((n for n in range(entries) if live[n]), key=lambda n: (not fixed[n], 0 if fixed[n] else -value[n], n))
        kept = set(ranked[:limit])
        destinations, counts, place = np.full(entries, slots), [], 0
        for s in range(streams):
            own = [*range(start[s], start[s + 1]), *range(slots + s * width, slots + (s + 1) * width)]
            own = [n for n in own if n in kept]
            destinations[own] = np.arange(place, place + len(own))
            counts.append(len(own))
            place += len(own)
        rows.append(([n in kept for n in range(entries)], counts, destinations, any(np.isnan(score) & live)))
    return [np.array(column) for column in zip(*rows, strict=True)]


def assert_same(got, expected):
    for field, a, b in zip(reference.TopK._fields, got, expected, strict=False):
        np.testing.assert_array_equal(a, b, err_msg=field)


def keys_of(case, seed=0):
    """select_keys' arguments but the width."""
    given = cases.arrays(case, seed)
    return reference.ordered_keys(given["scores"], given["valid"], given["protected"]), given["k"], given["starts"]


@functools.cache
def compiled(module, width):
    """One jitted form for all cases of a width, so that those of one shape share a compilation."""
    options = {} if module in (reference, xla) else {"interpret": True}
    return jax.jit(lambda *arguments: module.select_keys(*arguments, width, **options))


@pytest.mark.parametrize("name", SMALL)
def test_reference_is_what_sorted_lists_say(name):
    given = cases.arrays(SMALL[name])
    assert_same(global_topk(**given, implementation="reference"), by_hand(**given))


@pytest.mark.parametrize("name", SMALL)
def test_on_a_cpu(name):
    given = cases.arrays(SMALL[name], seed=1)
    assert_same(global_topk(**given), global_topk(**given, implementation="reference"))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("module", [tpu, gpu], ids=["tpu", "gpu"])
def test_kernels_interpreted(module, name):
    case = SMALL[name]
    assert_same(compiled(module, case.width)(*keys_of(case)), compiled(reference, case.width)(*keys_of(case)))


STREAMED = Case(batch=2, streams=3, slots=69000, width=250)


@pytest.mark.parametrize("bits, vmem", [(16, 1_060_000), (8, 930_000)])
def test_tpu_streamed(monkeypatch, bits, vmem):
    """A row that does not fit: three chunks of keys, the last of them overlapping, and as many bits as fit."""
    monkeypatch.setattr(tpu, "CHUNK", 256)
    assert tpu.digit_bits(tpu.row_count(STREAMED.entries), STREAMED.streams, vmem) == bits
    select = jax.jit(lambda *arguments: tpu.select_keys(*arguments, STREAMED.width, interpret=True, vmem=vmem))
    for changes in ({}, {"scores": "ties"}, {"scores": "special", "keep": 0.8}, {"keep": 1.0}, {"keep": 0.0}):
        keys, k, starts = keys_of(Case(**{**vars(STREAMED), **changes}))
        assert_same(select(keys, k, starts), compiled(reference, STREAMED.width)(keys, k, starts))


@pytest.mark.parametrize("case, vmem, bits", [(SMALLEST, None, 32), (STREAMED, 1_060_000, 16)], ids=["resident", "streamed"])
def test_tpu_races(monkeypatch, case, vmem, bits):
    monkeypatch.setattr(tpu, "CHUNK", 256)
    case = Case(**{**vars(case), "batch": 1 if vmem else case.batch})
    keys, k, starts = keys_of(case)
    with races.none_found() as params:
        assert_same(tpu.select_keys(keys, k, starts, case.width, interpret=params, vmem=vmem), reference.select_keys(keys, k, starts, case.width))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan])), min_size=1, max_size=40), st.data())
def test_is_a_stable_sort(values, data):
    n = 40
    scores = np.pad(np.float32(values), (0, n - len(values)), constant_values=np.nan)[None]
    valid = (np.arange(n) < len(values))[None]
    protected = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))[None]
    k, cut = data.draw(st.integers(0, n)), data.draw(st.integers(0, n - 2 * 7))
    given = dict(scores=scores, valid=valid & ((np.arange(n) < cut) | (np.arange(n) >= n - 14)), protected=protected)
    given |= dict(k=np.array([k], np.int32), starts=np.array([[0, cut // 2, cut]], np.int32), width=7)
    keys = np.asarray(reference.ordered_keys(given["scores"], given["valid"], protected))[0]
    order = np.argsort(~keys, kind="stable")  # ~ turns the order round, without overflow
    keep = np.isin(np.arange(n), order[:k]) & given["valid"][0]
    got = global_topk(**given)
    np.testing.assert_array_equal(got.keep[0], keep)
    assert_same(got, by_hand(**given))


@pytest.mark.parametrize("form", [reference.top_k_mask, xla.top_k_mask], ids=["reference", "xla"])
def test_top_k_mask_over_any_leading_axes(form):
    rng = np.random.default_rng(0)
    keys = rng.integers(-3, 3, (2, 3, 333)).astype(np.int32)
    keys[rng.random(keys.shape) < 0.1] = LOWEST
    k = np.array([[0, 1, 100], [200, 332, 333]], np.int32)
    keep = np.asarray(form(jnp.asarray(keys), jnp.asarray(k)))
    for index in np.ndindex(2, 3):
        order = np.argsort(~keys[index], kind="stable")[: k[index]]
        np.testing.assert_array_equal(keep[index], np.isin(np.arange(333), order) & (keys[index] > LOWEST))


def test_ordered_keys():
    ascending = np.float32([-np.inf, -3e38, -1.0, -1e-40, 0.0, 1e-40, 1e-37, 1.0, 3e38, np.inf])
    yes, no = np.ones(ascending.shape, bool), np.zeros(ascending.shape, bool)
    keys = np.asarray(jax.jit(reference.ordered_keys)(ascending, yes, no))
    assert (np.diff(keys) > 0).all() and LOWEST < keys[0] and keys[-1] < HIGHEST

    def key(score):
        return int(reference.ordered_keys(np.float32(score), True, False))

    assert key(-0.0) == key(0.0)
    assert key(np.nan) == key(-np.nan) == key(-np.inf)
    assert (np.asarray(reference.ordered_keys(ascending, no, yes)) == LOWEST).all()
    assert (np.asarray(reference.ordered_keys(ascending, yes, yes)) == HIGHEST).all()


def arguments(**changes):
    given = cases.arrays(SMALLEST)
    return {**given, **{name: change(given[name]) for name, change in changes.items()}}


def test_nan_ranks_last_and_is_reported():
    scores = jnp.full((2, 110), -1.0).at[:, 105].set(-jnp.inf).at[0, 104].set(jnp.nan).at[1, 0].set(jnp.nan)
    valid = jnp.ones((2, 110), bool).at[1, 0].set(False).at[:, 50:100].set(False)
    given = arguments(scores=lambda _: scores, valid=lambda _: valid, starts=lambda _: jnp.array([[0, 20, 50]] * 2, jnp.int32))
    got = global_topk(**{**given, "protected": jnp.zeros_like(valid), "k": jnp.array([59, 58], jnp.int32)})
    assert got.has_nan.tolist() == [True, False]
    # In the first row NaN and -inf tie, and the NaN comes first.
    assert got.keep[0, 104] and not got.keep[0, 105] and not got.keep[1, 105]


def test_a_traced_k_out_of_range():
    given = arguments(k=lambda k: jnp.array([-1, 999], jnp.int32))
    keep = jax.jit(lambda given: global_topk(**given, width=SMALLEST.width).keep)({name: x for name, x in given.items() if name != "width"})
    np.testing.assert_array_equal(keep, given["valid"] & np.array([[False], [True]]))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(scores=lambda x: x[0]), "scores: got shape"),
        (dict(scores=lambda x: x.astype(jnp.bfloat16)), "scores: got bfloat16, takes float32"),
        (dict(scores=lambda x: 3.0), "scores: got float"),
        (dict(valid=lambda x: x[:, 1:]), "valid: got shape"),
        (dict(valid=lambda x: x.astype(jnp.int32)), "valid: got int32, takes bool"),
        (dict(protected=lambda x: x[:1]), "protected: got shape"),
        (dict(protected=lambda x: None), "protected: got NoneType"),
        (dict(k=lambda x: 5), "k: got int"),
        (dict(k=lambda x: x[:1]), "k: got shape"),
        (dict(k=lambda x: x.astype(jnp.float32)), "k: got float32, takes int32"),
        (dict(k=lambda x: x.at[1].set(111)), r"k: got \[\d+, 111\], takes 0 to N = 110"),
        (dict(k=lambda x: x.at[0].set(-1)), r"k: got \[-1, \d+\], takes 0 to N"),
        (dict(starts=lambda x: x[0]), "starts: got shape"),
        (dict(starts=lambda x: x[:, :1]), "starts: got shape"),
        (dict(starts=lambda x: x.astype(jnp.int16)), "starts: got int16, takes int32"),
        (dict(starts=lambda x: x.at[1].set(jnp.array([0, 9, 8]))), r"starts: got \[0, 9, 8\], takes rows that begin with 0 and rise"),
        (dict(starts=lambda x: x.at[0].set(jnp.array([1, 5, 9]))), r"starts: got \[1, 5, 9\]"),
        (dict(starts=lambda x: x.at[1].set(jnp.array([0, 5, 101]))), r"starts: got \[0, 5, 101\], takes .* at most C = N - S\*W = 100"),
        (dict(width=lambda x: 56), "width: got 56, takes an int from 0 to 55"),
        (dict(width=lambda x: -1), "width: got -1"),
        (dict(width=lambda x: 5.0), "width: got 5.0"),
    ],
)
def test_check(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        global_topk(**arguments(**changes))


def test_check_of_keys_and_implementation():
    keys, k, starts = keys_of(SMALLEST)
    with pytest.raises(ValueError, match="^keys: got float32, takes int32"):
        select_keys(keys.astype(jnp.float32), k, starts, SMALLEST.width)
    with pytest.raises(ValueError, match="^keys: got shape"):
        select_keys(keys[:, :0], k, starts, SMALLEST.width)
    with pytest.raises(ValueError, match="^implementation is 'cuda': None and 'reference', 'cpu', 'tpu', 'gpu' work"):
        select_keys(keys, k, starts, SMALLEST.width, implementation="cuda")
    with pytest.raises(NotImplementedError, match="^keys: a row of .* is more than 1000000 bytes of VMEM can search"):
        tpu.digit_bits(1 << 20, 3, 1_000_000)


@pytest.mark.parametrize("name", REAL)
def test_traffic(name):
    case = REAL[name]
    for target in bench.CHIPS:
        fewest, moved = bench.traffic(case, target)
        sweeps = bench.sweeps(case, target)
        assert fewest == 9 * case.batch * case.entries and moved >= fewest
        # Who has less VMEM than the keys: v4 16 MiB, v5p and tpu7x 64.
        streamed = (name, target) in {("4m", "v4"), ("16m", "v4"), ("16m", "v5p"), ("16m", "tpu7x")}
        assert streamed or (sweeps == 1 and moved <= 1.01 * fewest)
    assert bench.sweeps(REAL["4m"], "v4") == bench.sweeps(REAL["16m"], "v5p") == 3 and bench.sweeps(REAL["16m"], "v4") == 9
    assert bench.traffic(case, "h100")[1] > 9 * 4 * case.batch * case.entries


def test_rows_of_the_benchmark(monkeypatch):
    monkeypatch.setattr(cases, "REAL", dict.fromkeys(("qwen3_m512", "1m"), SMALLEST))
    rows = list(bench.rows("cpu", lambda function, *args: len(jax.tree.leaves(jax.jit(function)(*args)))))
    assert [row["operation"] for row in rows] == ["global_topk"] * 2
    assert all(row["seconds"] == 3 and row["rivals"]["jax.lax.top_k"] == 2 and row["bytes"] == bench.fewest(SMALLEST) for row in rows)


DEVICES = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def on_devices():
    """{devices: what went wrong}, from a process that has eight."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-m", __spec__.name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("devices", DEVICES)
def test_sharded(on_devices, devices):
    assert on_devices[str(devices)] == []


def run_sharded(devices: int) -> list[str]:
    """13 streams dealt out unevenly, each with its share of the slots: what each device does against one top-k of all of their entries."""
    from pallas_kernels.global_topk.sharded import sharded_topk

    streams, width, slots, batch, wrong = 13, 5, 40, 2, []
    owned = -(-streams // devices)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("model",))
    spec, whole = jax.sharding.PartitionSpec("model"), jax.sharding.PartitionSpec()

    def local(keys, k, starts):
        return jax.tree.map(lambda x: x[None], sharded_topk(keys[0], k, starts[0], width, "model"))

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec, whole, spec), out_specs=spec, check_vma=False))
    for seed, spread in enumerate((3, 2**31)):
        rng = np.random.default_rng(seed)
        entries = owned * (slots + width)
        keys = rng.integers(-spread, spread, (devices, batch, entries), dtype=np.int64).astype(np.int32)
        starts = np.zeros((devices, batch, owned + 1), np.int32)
        starts[..., 1:] = np.sort(rng.integers(0, owned * slots, (devices, batch, owned)))
        for device in range(devices):
            # The last devices have fewer streams than the first, or none: what they lack is padding.
            missing = min(max((device + 1) * owned - streams, 0), owned)
            starts[device, :, owned - missing :] = starts[device, :, [owned - missing]].T
            for row in range(batch):
                keys[device, row, starts[device, row, -1] : owned * slots] = LOWEST
            keys[device, :, entries - missing * width :] = LOWEST
        total = (keys > LOWEST).sum((0, 2))
        for k in (total // 3, total, total - 1, 0 * total, np.array([1, 2])):
            got = jax.tree.map(np.asarray, run(keys, k.astype(np.int32), starts))
            for row in range(batch):
                together = keys[:, row].reshape(-1)
                order = np.argsort(~together, kind="stable")[: k[row]]
                keep = (np.isin(np.arange(together.size), order) & (together > LOWEST)).reshape(devices, entries)
                for device in range(devices):
                    own = by_hand(np.zeros((1, entries)), keep[device][None], np.zeros((1, entries)), [entries], starts[device, row][None], width)
                    for field, a, b in zip(got._fields, got, own, strict=False):
                        if not (a[device, row] == b[0]).all():
                            wrong.append(f"{field}, k {k.tolist()}, row {row}, device {device}, spread {spread}")
    return wrong


if __name__ == "__main__":
    print(json.dumps({devices: run_sharded(devices) for devices in DEVICES}))
