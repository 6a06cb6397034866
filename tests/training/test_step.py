"""The gate-training step on a tiny random model, against a student, a teacher and losses written again without blocks, packing or remat."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import smollm2_135m
from retention import gates, model
from retention.training import sharding
from retention.training.step import gate_input_rms, init_state, kept_share, make_optimizer, make_step
from tests.conftest import small_config, small_model

CONFIG = small_config()
PARAMS = small_model(CONFIG).params
MESH = sharding.make_mesh({}, jax.devices()[:1])
GLOBAL, TIED, LOCAL, SINKS = (
    gates.GateConfig("global", width=8),
    gates.GateConfig("global", width=8, tie_heads=True),
    gates.GateConfig("local", width=8),
    gates.GateConfig("global", width=8, sinks=2),
)
NAMES = {GLOBAL: "global", TIED: "tied", LOCAL: "local", SINKS: "sinks"}
ROWS = ((21, 13), (9, 16, 8))  # the documents packed into each row, and how long they are
LENGTHS = np.array([length for row in ROWS for length in row])
KEY = jax.random.key(0)
# The budgets: of one gate in tokens, of the others as shares of the mean document.
BUDGETS = dict.fromkeys((GLOBAL, TIED, LOCAL), (0.03, 0.25)) | {SINKS: (1.5, 6.0)}
QUICK = {"xla_backend_optimization_level": 0}  # to compile, which is what these tests spend their time on
STEPS = 40


def settings(**changes):
    optimizer = smollm2_135m.get_config().optimizer
    optimizer.update(changes)
    return optimizer


def recording(optimizer):
    """The optimizer, with the last gradient in its state."""

    def update(gradient, state, params):
        updates, inner = optimizer.update(gradient, state[1], params)
        return updates, (gradient, inner)

    return optax.GradientTransformation(lambda params: (jax.tree.map(jnp.zeros_like, params), optimizer.init(params)), update)


OPTIMIZER = recording(make_optimizer(settings(learning_rate=0.02), STEPS))


def every(*kinds):
    return pytest.mark.parametrize("gate", kinds, ids=NAMES.get)


@functools.cache
def documents():
    """(row, its tokens in the row) of each document."""
    return [(row, slice(sum(lengths[:i]), sum(lengths[: i + 1]))) for row, lengths in enumerate(ROWS) for i in range(len(lengths))]


def make_batch(shape=(2, 40)):
    """ROWS padded to `shape`; in each document a fifth of the tokens are answers, and two fifths others."""
    rng = np.random.default_rng(0)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "labels", "segment_ids", "positions")}
    batch |= {name: np.zeros(shape, bool) for name in ("answer", "other")}
    for segment, (row, at) in enumerate(documents(), 1):
        length = at.stop - at.start
        tokens = rng.integers(1, CONFIG.vocab_size, length)
        compared = at.start + rng.permutation(length - 1)[: 3 * length // 5]
        batch["tokens"][row, at], batch["labels"][row, at] = tokens, np.append(tokens[1:], 0)
        batch["segment_ids"][row, at], batch["positions"][row, at] = segment, np.arange(length)
        batch["answer"][row, compared[: length // 5]] = batch["other"][row, compared[length // 5 :]] = True
    return batch


@functools.cache
def fresh(gate):
    return gates.init(CONFIG, gate, 1, gate_input_rms(CONFIG, MESH, PARAMS, make_batch()))


def gate_params(gate, bias=1.0, spread=100.0):
    """Gates of spread scores (beta from about .3 to .99), so that no term of the loss vanishes."""
    params = fresh(gate)
    return params | {"readout": spread * params["readout"], "bias": jnp.full_like(params["bias"], bias)}


@functools.cache
def compiled(gate, remat):
    """The step with the weights of the loss as arguments, so that one compilation serves them all."""

    def step(weights, state, params, batch):
        low, high = BUDGETS[gate]
        loss = types.SimpleNamespace(**weights, budget_low=low, budget_high=high, remat=remat)
        return make_step(CONFIG, gate, OPTIMIZER, loss, MESH)(state, params, batch, KEY)

    return jax.jit(step, compiler_options=QUICK)


def advance(gate, state, batch=None, backbone=PARAMS, remat=False, **weights):
    """One step: (state, measurements)."""
    weights = dict(kl=1.0, ntp=1.0, other_kl=1.0, capacity=1.0) | weights
    # By way of numpy: weak types at the start, and a mesh's arrays after it, would have the step compiled again.
    state = jax.tree.map(np.asarray, state)
    state, measurements = compiled(gate, remat)(weights, state, backbone, batch or make_batch())
    return state, jax.tree.map(np.asarray, measurements)


def run(gate, params=None, step=0, **options):
    """(measurements, gradient) of one step."""
    state = init_state(gate_params(gate) if params is None else params, OPTIMIZER)._replace(step=jnp.int32(step))
    state, measurements = advance(gate, state, **options)
    return measurements, state.optimizer[0]


def apart(batch):
    """Each document's tokens in a row of its own, [documents, longest]; what follows a document's end is nothing that causal attention could see."""
    rows = np.zeros((len(LENGTHS), LENGTHS.max()), np.int32)
    for i, (row, at) in enumerate(documents()):
        rows[i, : LENGTHS[i]] = batch["tokens"][row, at]
    return rows


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def written_out(gate, params, tokens):
    """Logits [B,T,V], with every weight of the attention written out, log beta [L,B,T,H] and gate inputs [L,B,T,E]; gate None: the teacher."""
    layers = None if gate is None else gates.per_layer(params, CONFIG, gate)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    distance = np.arange(tokens.shape[1])[:, None] - np.arange(tokens.shape[1])

    def attend(carry, layer, q, k, v, h):
        log_beta = jnp.zeros(k.shape[:3]) if gate is None else gates.log_beta(layer, h, CONFIG.kv_heads).at[:, : gate.sinks].set(0.0)
        retention = jnp.exp(log_beta[:, None] * jnp.maximum(distance, 0)[:, :, None])  # beta_i^(t-i) [B,T,I,H]
        weight = jnp.exp(jnp.einsum("BTHGD,BIHD->BTIHG", q, k) * CONFIG.head_dim**-0.5) * retention[..., None]
        weight = weight * (distance >= 0)[:, :, None, None]
        return carry, jnp.einsum("BTIHG,BIHD->BTHGD", weight / weight.sum(axis=2, keepdims=True), v), (log_beta, h)

    decoder = model.bind(CONFIG, PARAMS)
    hidden, _, (log_beta, h) = decoder(tokens, positions, attend, layer_inputs=layers)
    return decoder.logits(hidden), log_beta, h


def log_softmax(x):
    x = np.float64(x)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def mass_of(log_beta):
    """S_t = sum over j <= t of beta_j^(t-j), of one document: [L,T,H] -> [L,T,H] float64."""
    return np.stack([sum(np.exp((t - j) * np.float64(log_beta[:, j])) for j in range(t + 1)) for t in range(log_beta.shape[1])], axis=1)


def capacity_of(masses, budget, one_pool):
    """METHOD section 3, from each document's mass [L,T,H]."""
    excess = []
    for mass in masses:
        for p in range(mass.shape[1]):
            pools = [mass[:, p].sum()] if one_pool else mass[:, p].ravel()
            n = mass[:, p].size // len(pools)
            excess += [(pool - budget * n) / max((p + 1 - budget) * n, 1) for pool in pools if pool > budget * n]
    return np.mean(excess)


def kept_by_sorting(scores, count):
    """scores: [L,N,H] -> [L,H]"""
    best_first = np.sort(scores.ravel())[::-1]
    least = best_first[min(math.ceil(count), scores.size) - 1]
    return (scores >= least).mean(axis=1)


@every(GLOBAL, TIED, LOCAL, SINKS)
def test_loss_is_what_its_parts_say(gate):
    """Packed as each document alone: nothing of one is seen from another."""
    batch, params = make_batch(), gate_params(gate)
    weights = dict(kl=2.0, ntp=0.5, other_kl=3.0, capacity=0.25)
    found, _ = run(gate, params, **weights)

    tokens = apart(batch)
    teacher, student = (log_softmax(written_out(one, params, tokens)[0]) for one in (None, gate))
    log_beta = np.asarray(written_out(gate, params, tokens)[1])
    log_beta = [log_beta[:, i, :length] for i, length in enumerate(LENGTHS)]
    spread = np.concatenate([one[:, gate.sinks :] for one in log_beta], axis=1)
    assert spread.min() < -1 and spread.max() > -0.05
    kl, ntp, other = [], [], []
    for i, (row, at) in enumerate(documents()):
        for p, (answer, compared) in enumerate(zip(batch["answer"][row, at], batch["other"][row, at], strict=True)):
            divergence = np.sum(np.exp(teacher[i, p]) * (teacher[i, p] - student[i, p]))
            if answer:
                kl.append(divergence)
                ntp.append(-student[i, p, tokens[i, p + 1]])
            if compared:
                other.append(divergence)
    assert min(len(kl), len(other)) > 10
    assert (found["answers"], found["others"], found["documents"], found["tokens"]) == (len(kl), len(other), len(LENGTHS), LENGTHS.sum())
    assert found["kl"] == pytest.approx(np.mean(kl), rel=1e-3)
    assert found["ntp"] == pytest.approx(np.mean(ntp), rel=1e-4)
    assert found["other_kl"] == pytest.approx(np.mean(other), rel=1e-3)
    assert min(found[name] for name in weights) > 0.002

    masses = [mass_of(one) for one in log_beta]
    assert found["capacity"] == pytest.approx(capacity_of(masses, found["budget"], gate.kind == "global"), rel=1e-3)
    assert found["loss"] == pytest.approx(sum(weight * found[name] for name, weight in weights.items()), rel=1e-5)

    shares = np.concatenate([mass / np.arange(1, mass.shape[1] + 1)[:, None] for mass in masses], axis=1)
    np.testing.assert_allclose(found["retained_by_layer"], shares.mean(axis=(1, 2)), rtol=1e-4)
    assert found["retained_share"] == pytest.approx(shares.mean(), rel=1e-4)
    # At the step that follows its document, a token is as many tokens old as there are from it to the end.
    scores = np.concatenate([one * np.arange(one.shape[1], 0, -1)[:, None] for one in log_beta], axis=1)
    if gate.kind == "local":
        streams = scores.transpose(0, 2, 1).reshape(-1, scores.shape[1])
        kept = np.reshape([kept_by_sorting(one[None, :, None], found["budget"] * len(LENGTHS)) for one in streams], found["kept_share"].shape)
    else:
        kept = kept_by_sorting(scores, found["budget"] * len(LENGTHS) * CONFIG.streams)
        assert kept.std() > 0.01
    np.testing.assert_allclose(found["kept_share"], kept, atol=1e-6)


@every(GLOBAL, TIED, LOCAL)
def test_gradient_against_finite_differences(gate):
    params = gate_params(gate)
    # Below one token a stream every time exceeds the budget: the mean over those that do would jump where one crosses it.
    step = next(step for step in range(20) if run(gate, params, step=step)[0]["budget"] < 0.99)
    measured, gradient = run(gate, params, step=step)
    assert measured["gradient_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    assert gradient.keys() == params.keys()
    for name, leaf in gradient.items():
        at = np.unravel_index(np.abs(leaf).argmax(), leaf.shape)

        def loss(change, name=name, at=at):
            return run(gate, params | {name: params[name].at[at].add(change)}, step=step)[0]["loss"]

        h = 0.01 if name in ("w1", "w2") else 0.03
        slope = (8 * (loss(h) - loss(-h)) - loss(2 * h) + loss(-2 * h)) / (12 * h)
        assert abs(slope) > 1e-3, name
        assert float(leaf[at]) == pytest.approx(slope, rel=0.02), name


@every(GLOBAL, LOCAL)
def test_gates_that_start_open_are_the_teacher(gate):
    measured, gradient = run(gate, gate_params(gate, bias=18.0, spread=1.0))
    assert abs(measured["kl"]) < 1e-6 and abs(measured["other_kl"]) < 1e-6
    assert measured["retained_share"] == pytest.approx(1, abs=1e-4)
    # All is kept, the largest excess there is, 1; a little less where a position is within one token of the budget.
    assert 0.9 < measured["capacity"] <= 1.0001
    assert 0 < float(optax.tree.norm(gradient)) < 1e-3


@every(GLOBAL, LOCAL)
def test_training_changes_the_gates_alone_and_lowers_loss_and_retained_mass(gate):
    start = gate_params(gate, bias=6.0, spread=1.0)
    backbone, state = jax.tree.map(np.array, PARAMS), init_state(start, OPTIMIZER)
    for _ in range(STEPS):
        state, _ = advance(gate, state)
    before, after = (run(gate, params)[0] for params in (start, state.params))
    for name, margin in {"loss": 0.3, "capacity": 0.4, "retained_share": 0.3}.items():
        assert after[name] < before[name] - margin, name
    assert int(state.step) == STEPS
    jax.tree.map(np.testing.assert_array_equal, PARAMS, backbone)
    assert state.params.keys() == start.keys()
    for name, leaf in state.params.items():
        assert leaf.dtype == jnp.float32 and leaf.shape == start[name].shape and not np.array_equal(leaf, start[name]), name


def test_batch_in_which_nothing_is_labelled_teaches_nothing():
    """Not through decay or moments either, but the step is counted."""
    batch = make_batch()
    before, _ = advance(GLOBAL, init_state(gate_params(GLOBAL), OPTIMIZER))
    after, measured = advance(GLOBAL, before, batch=batch | {name: np.zeros_like(batch[name]) for name in ("answer", "other")})
    assert int(after.step) == int(before.step) + 1 == 2
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=before.step), before)
    for name in ("loss", "kl", "ntp", "other_kl", "answers", "others", "gradient_norm"):
        assert measured[name] == 0, name
    assert measured["capacity"] > 0 and measured["tokens"] == LENGTHS.sum()


def test_remat_changes_nothing():
    # A head that predicts sharply: the divergences of an almost uniform model are as small as the rounding of its log-probabilities.
    sharp = PARAMS | {"head": 10 * PARAMS["head"]}
    (kept, kept_gradient), (again, again_gradient) = run(GLOBAL, backbone=sharp), run(GLOBAL, backbone=sharp, remat=True)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), again, kept)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), again_gradient, kept_gradient)


def test_padding_does_not_matter():
    batch = make_batch()
    measured, gradient = run(GLOBAL, batch=batch)
    padding = batch["segment_ids"] == 0
    assert padding.any(axis=1).all()
    changed, changed_gradient = run(GLOBAL, batch=batch | {name: np.where(padding, 7, batch[name]) for name in ("tokens", "labels")})
    jax.tree.map(np.testing.assert_array_equal, (changed, changed_gradient), (measured, gradient))
    # Nor does more of it, and a row that holds nothing else.
    more, more_gradient = run(GLOBAL, batch=make_batch((3, 56)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), more, measured)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), more_gradient, gradient)


@pytest.mark.parametrize("gate, unit", [(GLOBAL, LENGTHS.mean()), (SINKS, 1)], ids=["shares", "tokens"])
def test_budget_is_drawn_log_uniformly_each_step(gate, unit):
    low, high = BUDGETS[gate]
    budgets = [run(gate, step=step)[0]["budget"] / unit for step in range(40)]
    assert low <= min(budgets) < 1.3 * low and high / 1.3 < max(budgets) <= high
    assert np.exp(np.mean(np.log(budgets))) == pytest.approx((low * high) ** 0.5, rel=0.25)  # well below the mean of the two
    assert run(gate, step=7)[0]["budget"] / unit == budgets[7]


def test_batch_without_answers_is_finite():
    batch = make_batch()
    measured, gradient = run(GLOBAL, batch=batch | {"answer": np.zeros_like(batch["answer"])})
    assert measured["answers"] == measured["kl"] == measured["ntp"] == 0 and measured["other_kl"] > 0
    assert measured["loss"] == pytest.approx(measured["other_kl"] + measured["capacity"], rel=1e-5)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in gradient.values())


def test_tokens_whose_losses_have_no_weight_teach_nothing():
    """Of other tokens alone and no weight on their KL the capacity would be left, which teaches to forget."""
    batch = make_batch()
    unanswered = batch | {"answer": np.zeros_like(batch["answer"])}
    before = init_state(gate_params(GLOBAL), OPTIMIZER)
    after, measured = advance(GLOBAL, before, batch=unanswered, other_kl=0.0)
    assert measured["others"] > 0 == measured["compared"] == measured["loss"] and measured["capacity"] > 0
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    _, measured = advance(GLOBAL, before, batch=batch, other_kl=0.0)
    assert measured["compared"] == measured["answers"] > 0


def test_sinks_stay():
    """Gates that forget all at once still keep the sinks of every document: with two, every time holds those and the newest token."""
    measured, _ = run(SINKS, gate_params(SINKS, bias=-40.0, spread=0.0))
    shares = [min(p + 1, 3) / (p + 1) for length in LENGTHS for p in range(length)]
    assert measured["retained_share"] == pytest.approx(np.mean(shares), rel=1e-5)
    # If the budget ranks them, they come first: there are no others of score 0.
    step = next(step for step in range(20) if run(SINKS, step=step)[0]["budget"] < 2)
    measured, _ = run(SINKS, gate_params(SINKS, bias=-40.0, spread=0.0), step=step)
    np.testing.assert_allclose(measured["kept_share"], 2 * len(LENGTHS) / LENGTHS.sum(), rtol=1e-6)


def test_bfloat16_backbone():
    backbone = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    measured, gradient = run(GLOBAL, backbone=backbone)
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in gradient.values())
    assert measured["loss"] == pytest.approx(run(GLOBAL)[0]["loss"], rel=0.05)


def test_gate_input_rms():
    batch = make_batch()
    h = np.asarray(written_out(None, None, apart(batch))[2], np.float64)
    h = np.concatenate([h[:, i, :length] for i, length in enumerate(LENGTHS)], axis=1)
    np.testing.assert_allclose(gate_input_rms(CONFIG, MESH, PARAMS, batch), np.sqrt((h**2).mean(axis=(1, 2))), rtol=1e-5)


@pytest.mark.parametrize("count", [1, 7, 40.5, 100, 10_000])
@pytest.mark.parametrize("ties", [False, True])
def test_kept_share(ties, count):
    rng = np.random.default_rng(0)
    log_beta, distance, inside = -np.exp(rng.normal(0, 3, (3, 2, 20, 2))), rng.integers(1, 20, (2, 20)), rng.random((2, 20)) < 0.7
    if ties:
        log_beta, distance = np.round(log_beta / 4), np.full_like(distance, 3)
    log_beta[:, ~inside] = 0  # what does not count would come first
    log_beta = np.float32(log_beta)
    found = kept_share(log_beta, distance, inside, count, one_pool=True)
    np.testing.assert_allclose(found, kept_by_sorting((distance[..., None] * log_beta)[:, inside], count), rtol=1e-6)
    kept, there = round(float(found.sum()) * inside.sum()), 6 * inside.sum()
    assert kept > count if ties and count < there else kept == min(math.ceil(count), there)
    each = kept_share(log_beta, distance, inside, count, one_pool=False)
    for layer in range(3):
        for head in range(2):
            alone = (distance * log_beta[layer, ..., head])[inside][None, :, None]
            np.testing.assert_allclose(each[layer, head], kept_by_sorting(alone, count)[0, 0], rtol=1e-6)


def test_optimizer_schedule_and_decay():
    section = settings(weight_decay=1.0)
    optimizer = make_optimizer(section, STEPS)
    params = {"w1": jnp.ones(3), "bias": jnp.full(2, 8.0)}
    state, sizes, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for _ in range(STEPS):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        np.testing.assert_array_equal(updates["bias"], 0)  # no gradient, no decay
        sizes.append(-float(updates["w1"][0]))
    assert sizes[0] == 0 and np.argmax(sizes) == section.warmup_steps
    assert max(sizes) == pytest.approx(section.learning_rate)
    assert sizes[-1] == pytest.approx(section.learning_rate * section.final_fraction, rel=0.3)
    with pytest.raises(ValueError, match="steps must be more than optimizer.warmup_steps"):
        make_optimizer(section, section.warmup_steps)


def test_the_optimizer_is_adamw_with_the_sections_numbers():
    """Against the equations of Loshchilov and Hutter (arXiv 1711.05101) in float64; every number but the decay matters to these steps."""
    section = settings(learning_rate=0.5, warmup_steps=0, final_fraction=1.0, clip_norm=1e-3, b1=0.5, b2=0.7, eps=1e-4, weight_decay=0.0)
    optimizer, params = make_optimizer(section, 9), {"w1": jnp.ones(4)}
    state, mean, square = optimizer.init(params), 0.0, 0.0
    for t, gradient in enumerate(np.array([[3, 4, 0, 0], [1e-4, 2e-4, 0, 0], [9, 12, 0, 0]]), 1):  # the second is not clipped
        updates, state = optimizer.update({"w1": jnp.float32(gradient)}, state, params)
        clipped = gradient * min(1, 1e-3 / np.linalg.norm(gradient))
        mean, square = 0.5 * mean + 0.5 * clipped, 0.7 * square + 0.3 * clipped**2
        wanted = -0.5 * (mean / (1 - 0.5**t)) / (np.sqrt(square / (1 - 0.7**t)) + 1e-4)
        np.testing.assert_allclose(updates["w1"], wanted, rtol=1e-4, atol=1e-9)
