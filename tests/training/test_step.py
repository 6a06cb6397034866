"""The gate-training step on a tiny random model, against a student, a teacher and losses written again without blocks, scans or remat."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import smollm2_135m
from retention import gates, model
from retention.training.losses import capacity_loss
from retention.training.step import gate_input_rms, init_state, make_optimizer, make_step
from tests.conftest import small_config, small_model
from tests.training.test_losses import double_loop_mass

CONFIG = small_config()
PARAMS = small_model(CONFIG).params
GLOBAL, TIED, LOCAL, SINKS = (
    gates.GateConfig("global", width=8),
    gates.GateConfig("global", width=8, tie_heads=True),
    gates.GateConfig("local", width=8),
    gates.GateConfig("global", width=8, sinks=2),
)
NAMES = {GLOBAL: "global", TIED: "tied", LOCAL: "local", SINKS: "sinks"}
LENGTHS = (40, 33)
KEY = jax.random.key(0)
QUICK = {"xla_backend_optimization_level": 0}  # to compile, which is what these tests spend their time on

# An optimizer whose state is the last gradient, and which changes nothing.
GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


def every(*kinds):
    return pytest.mark.parametrize("gate", kinds, ids=NAMES.get)


def make_batch(total=40, seed=0):
    """Two documents of LENGTHS tokens padded to `total`; 12 targets each, the last 4 of the second padded too."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((2, total), np.int32)
    targets, valid = np.zeros((2, 12), np.int32), np.ones((2, 12), bool)
    valid[1, 8:] = False
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = rng.integers(1, CONFIG.vocab_size, length)
        targets[row, valid[row]] = rng.choice(length - 1, valid[row].sum(), replace=False)
    answer = valid & (np.arange(12) < 5)
    return {"tokens": tokens, "length": np.array(LENGTHS, np.int32), "targets": targets, "answer": answer, "valid": valid}


def section(**changes):
    loss = dict(kl=1.0, ntp=1.0, other_kl=1.0, capacity=1.0, budget_low=0.03, budget_high=0.25, capacity_every=1, remat=False)
    return ConfigDict(loss | changes)


@functools.cache
def fresh(gate):
    rms = jax.jit(gate_input_rms, static_argnums=0)(CONFIG, PARAMS, make_batch()["tokens"])
    return gates.init(CONFIG, gate, 1, rms)


def gate_params(gate, bias=1.0, spread=100.0):
    """Gates of spread scores (beta from about .3 to .99), so that no term of the loss vanishes."""
    params = fresh(gate)
    return params | {"readout": spread * params["readout"], "bias": jnp.full_like(params["bias"], bias)}


@functools.cache
def compiled(gate, capacity_every=1, remat=False):
    """The step with every number of the loss section an argument, so that one compilation serves them all."""

    class Section(dict):
        __getattr__ = dict.__getitem__

    def step(numbers, state, params, batch):
        fixed = {"capacity_every": capacity_every, "remat": remat}
        return make_step(CONFIG, gate, GRADIENT, Section(numbers | fixed))(state, params, batch, KEY)

    return jax.jit(step, compiler_options=QUICK)


def run(gate, params=None, batch=None, backbone=PARAMS, step=0, capacity_every=1, remat=False, **changes):
    """(measurements, gradient) of one step."""
    state = init_state(gate_params(gate) if params is None else params, GRADIENT)._replace(step=jnp.int32(step))
    numbers = {name: value for name, value in section(**changes).items() if isinstance(value, float)}
    state, measurements = compiled(gate, capacity_every, remat)(numbers, state, backbone, batch or make_batch())
    return {name: float(value) for name, value in measurements.items()}, state.optimizer


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def student_logits(gate, params, tokens):
    """Retention-gated logits [B,T,V] with every weight written out, and log beta [L,B,T,H]."""
    layers = gates.per_layer(params, CONFIG, gate)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    distance = np.arange(tokens.shape[1])[:, None] - np.arange(tokens.shape[1])

    def attend(carry, layer, q, k, v, h):
        log_beta = gates.log_beta(layer, h, CONFIG.kv_heads)
        log_beta = log_beta.at[:, : gate.sinks].set(0.0)
        retention = jnp.exp(log_beta[:, None] * jnp.maximum(distance, 0)[:, :, None])  # beta_i^(t-i) [B,T,I,H]
        weight = jnp.exp(jnp.einsum("BTHGD,BIHD->BTIHG", q, k) * CONFIG.head_dim**-0.5) * retention[..., None]
        weight = weight * (distance >= 0)[:, :, None, None]
        return carry, jnp.einsum("BTIHG,BIHD->BTHGD", weight / weight.sum(axis=2, keepdims=True), v), log_beta

    decoder = model.bind(CONFIG, PARAMS)
    hidden, _, log_beta = decoder(tokens, positions, attend, layer_inputs=layers)
    return decoder.logits(hidden), log_beta


def log_softmax(x):
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@every(GLOBAL, TIED, LOCAL, SINKS)
def test_loss_is_what_its_parts_say(gate):
    batch, params = make_batch(), gate_params(gate)
    factors = dict(kl=2.0, ntp=0.5, other_kl=3.0, capacity=0.25)
    found, _ = run(gate, params, **factors)

    teacher = log_softmax(np.asarray(model.full_logits(CONFIG, PARAMS, jnp.asarray(batch["tokens"])), np.float64))
    student, log_beta = map(np.asarray, student_logits(gate, params, batch["tokens"]))
    student = log_softmax(student.astype(np.float64))
    assert log_beta.min() < -1 and log_beta[:, :, gate.sinks :].max() > -0.05
    kl, ntp, other = [], [], []
    for row in range(2):
        for slot in np.flatnonzero(batch["valid"][row]):
            t = batch["targets"][row, slot]
            divergence = np.sum(np.exp(teacher[row, t]) * (teacher[row, t] - student[row, t]))
            (kl if batch["answer"][row, slot] else other).append(divergence)
            if batch["answer"][row, slot]:
                ntp.append(-student[row, t, batch["tokens"][row, t + 1]])
    assert (len(kl), len(other)) == (10, 10)
    assert found["kl"] == pytest.approx(np.mean(kl), rel=1e-3)
    assert found["ntp"] == pytest.approx(np.mean(ntp), rel=1e-4)
    assert found["other_kl"] == pytest.approx(np.mean(other), rel=1e-3)
    assert min(found[name] for name in factors) > 0.002

    assert 0.03 * 36.5 <= found["budget"] <= 0.25 * 36.5
    times = np.arange(40)
    streams = np.concatenate([double_loop_mass(one, times) for one in log_beta], axis=1)  # [B, S, N]
    pools = streams[:, None] if gate.kind == "global" else streams[:, :, None]
    capacity = capacity_loss(jnp.asarray(pools), jnp.asarray(times), jnp.asarray(LENGTHS), jnp.float32(found["budget"]))
    assert found["capacity"] == pytest.approx(float(capacity), rel=1e-3)
    share = np.concatenate([(streams[row] / (times + 1))[:, :length].ravel() for row, length in enumerate(LENGTHS)])
    assert found["retained_share"] == pytest.approx(share.mean(), rel=1e-4)
    assert found["loss"] == pytest.approx(sum(factor * found[name] for name, factor in factors.items()), rel=1e-5)


@every(GLOBAL, TIED, LOCAL)
def test_gradient_against_finite_differences(gate):
    # Below one token a stream every time exceeds the budget: the mean over those that do would jump where one crosses it.
    budget = dict(budget_low=0.015, budget_high=0.016)
    params = gate_params(gate)
    measured, gradient = run(gate, params, **budget)
    assert measured["gradient_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    assert gradient.keys() == params.keys()
    for name, leaf in gradient.items():
        at = np.unravel_index(np.abs(leaf).argmax(), leaf.shape)

        def loss(change, name=name, at=at):
            return run(gate, params | {name: params[name].at[at].add(change)}, **budget)[0]["loss"]

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
    steps, settings = 40, smollm2_135m.get_config().optimizer
    settings.learning_rate = 0.02
    optimizer = make_optimizer(settings, steps)
    step = jax.jit(make_step(CONFIG, gate, optimizer, section(budget_low=0.1, budget_high=0.1001)), donate_argnums=0, compiler_options=QUICK)
    start = gate_params(gate, bias=6.0, spread=1.0)
    backbone, batch = jax.tree.map(np.array, PARAMS), make_batch()
    state, history = init_state(jax.tree.map(jnp.copy, start), optimizer), []
    for _ in range(steps):
        state, measured = step(state, PARAMS, batch, KEY)
        history.append({name: float(value) for name, value in measured.items()})
    for name, margin in {"loss": 0.3, "capacity": 0.4, "retained_share": 0.3}.items():
        assert history[-1][name] < history[0][name] - margin, name
    assert int(state.step) == steps
    jax.tree.map(np.testing.assert_array_equal, PARAMS, backbone)
    assert state.params.keys() == start.keys()
    for name, leaf in state.params.items():
        assert leaf.dtype == jnp.float32 and leaf.shape == start[name].shape and not np.array_equal(leaf, start[name]), name


def test_remat_changes_nothing():
    (kept, kept_gradient), (again, again_gradient) = run(GLOBAL), run(GLOBAL, remat=True)
    assert again == pytest.approx(kept, rel=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), again_gradient, kept_gradient)


def test_padding_does_not_matter():
    batch = make_batch()
    measured, gradient = run(GLOBAL, batch=batch)
    tokens, targets = batch["tokens"].copy(), batch["targets"].copy()
    tokens[1, LENGTHS[1] :] = 7
    changed, changed_gradient = run(GLOBAL, batch=batch | {"tokens": tokens})
    assert changed == measured
    jax.tree.map(np.testing.assert_array_equal, changed_gradient, gradient)
    # Nor do padded targets, nor more pads.
    targets[~batch["valid"]] = 5
    assert run(GLOBAL, batch=batch | {"targets": targets})[0] == pytest.approx(measured, rel=1e-6)
    assert run(GLOBAL, batch=make_batch(total=56))[0] == pytest.approx(measured, rel=1e-4)


def test_budget_is_drawn_log_uniformly_each_step():
    shares = [run(GLOBAL, step=step)[0]["budget"] / np.mean(LENGTHS) for step in range(40)]
    assert 0.03 <= min(shares) < 0.04 and 0.2 < max(shares) <= 0.25
    assert 0.065 < np.exp(np.mean(np.log(shares))) < 0.115  # the middle is the geometric mean, .087
    assert run(GLOBAL, step=7)[0]["budget"] / np.mean(LENGTHS) == shares[7]


def test_capacity_times_start_at_a_random_offset():
    """The newest token is all that these gates hold, a share of 1 / (t+1): with few times in a document the mean tells which they are."""
    params = gate_params(GLOBAL, bias=-40.0, spread=0.0)
    found = {round(run(GLOBAL, params, step=step, capacity_every=30)[0]["retained_share"], 6) for step in range(40)}
    wanted = {}
    for offset in range(30):
        inside = [t for length in LENGTHS for t in range(offset, length, 30)]
        wanted[offset] = round(float(np.mean([1 / (t + 1) for t in inside])), 6)
    assert found <= set(wanted.values()) and len(found) > 15


def test_batch_without_answers_is_finite():
    batch = make_batch()
    measured, gradient = run(GLOBAL, batch=batch | {"answer": np.zeros_like(batch["answer"])})
    assert measured["kl"] == measured["ntp"] == 0 and measured["other_kl"] > 0
    assert all(np.isfinite(leaf).all() for leaf in gradient.values())


def test_sinks_stay():
    """Gates that forget all at once still keep the sinks: with two, every time holds those and the newest token."""
    measured, _ = run(SINKS, gate_params(SINKS, bias=-40.0, spread=0.0))
    shares = [min(t + 1, 3) / (t + 1) for length in LENGTHS for t in range(length)]
    assert measured["retained_share"] == pytest.approx(np.mean(shares), rel=1e-5)


def test_bfloat16_backbone():
    backbone = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    measured, gradient = run(GLOBAL, backbone=backbone)
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in gradient.values())
    assert measured["loss"] == pytest.approx(run(GLOBAL)[0]["loss"], rel=0.05)


def test_gate_input_rms():
    tokens = make_batch()["tokens"]

    def attend(carry, layer, q, k, v, h):
        return carry, model.plain_attend(None, None, q, k, v, h)[1], h

    positions = np.broadcast_to(np.arange(40), tokens.shape)
    seen = np.asarray(model.bind(CONFIG, PARAMS)(jnp.asarray(tokens), positions, attend)[2], np.float64)
    np.testing.assert_allclose(gate_input_rms(CONFIG, PARAMS, tokens), np.sqrt((seen**2).mean(axis=(1, 2, 3))), rtol=1e-5)


def test_optimizer_schedule_and_decay():
    settings = smollm2_135m.get_config().optimizer
    settings.weight_decay = 1.0
    optimizer = make_optimizer(settings, 40)
    params = {"w1": jnp.ones(3), "bias": jnp.full(2, 8.0)}
    state, sizes, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for _ in range(40):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        np.testing.assert_array_equal(updates["bias"], 0)  # no gradient, no decay
        sizes.append(-float(updates["w1"][0]))
    assert sizes[0] == 0 and np.argmax(sizes) == settings.warmup_steps
    assert max(sizes) == pytest.approx(settings.learning_rate)
    assert sizes[-1] == pytest.approx(settings.learning_rate * settings.final_fraction, rel=0.3)
    with pytest.raises(ValueError, match="steps must be more than optimizer.warmup_steps"):
        make_optimizer(settings, settings.warmup_steps)
