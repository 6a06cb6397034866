"""What each policy stores and how it ranks, against the formulas in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retention import observations, policies
from retention.rows import Rows

LOG_BETA = np.array([0.0, -1e-30, -1.5e-8, -1e-6, -1e-3, -0.1, -0.693, -0.694, -3.0, -20.0, -87.0, -400.0], np.float32)
POSITION = np.array([0, 1, 500, 999])


def written(position, stream, **given):
    """New tokens of one layer, of which the policy is told `given`."""
    fields = {name: None for name in policies.Written._fields} | given
    return policies.Written(**fields | dict(position=jnp.asarray(position, jnp.int32), stream=jnp.asarray(stream, jnp.int32)[None, None, None]))


def grid(lookahead, seen=1000):
    """Scores [position, log beta] as the policy's compiled score gives them."""
    score = policies.retention.policy(lookahead=lookahead).score
    stat, position = np.meshgrid(LOG_BETA, POSITION)
    return np.asarray(jax.jit(score)(jnp.asarray(stat), jnp.asarray(position, jnp.int32), jnp.int32(seen)))


def test_retention_at_the_next_token():
    """METHOD section 4: s = (q - pos) log beta, q the next token's position."""
    expected = (1000.0 - POSITION[:, None]) * LOG_BETA.astype(np.float64)
    np.testing.assert_allclose(grid(1), expected, rtol=1e-6)
    # beta = 1 keeps for ever: nothing scores higher, at any age.
    assert (grid(1)[:, 0] == 0).all() and (grid(1)[:, 1:] < 0).all()


@pytest.mark.parametrize("lookahead", [2, 7, 512, 100_000])
def test_retention_over_the_next_n_tokens(lookahead):
    """s = (q + 1 - pos) log beta + log(1 - beta^n) - log(1 - beta), log n at beta = 1, which is the sum of beta^(q+1-pos .. q+n-pos); less log n."""
    log_beta = LOG_BETA[1:].astype(np.float64)
    total = np.log(-np.expm1(lookahead * log_beta)) - np.log(-np.expm1(log_beta))
    expected = np.concatenate([[0], total - np.log(lookahead)]) + (1001.0 - POSITION[:, None]) * LOG_BETA
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(grid(lookahead), expected, rtol=2e-6, atol=2e-6)
    # No cancellation where beta is near 1: 0 is approached from below.
    assert (grid(lookahead)[:, 1:] < 0).all() and (grid(lookahead)[3, :3] > -2e-2).all()


@pytest.mark.parametrize("lookahead", [1, 8, 512])
def test_gates_near_one_are_ranked_as_in_float64(lookahead):
    """As fresh gates are, at log beta = -1.5e-8."""
    rng = np.random.default_rng(0)
    log_beta, age = np.float32(-np.exp(rng.uniform(np.log(1e-9), np.log(1e-7), 4000))), rng.integers(1, 1000, 4000)
    score = jax.jit(policies.retention.policy(lookahead=lookahead).score)
    found = np.asarray(score(jnp.asarray(log_beta), jnp.asarray(1000 - age, jnp.int32), jnp.int32(1000)))
    x = log_beta.astype(np.float64)
    expected = age * x if lookahead == 1 else (age + 1) * x + np.log(np.mean(np.exp(np.arange(lookahead) * x[:, None]), axis=1))
    wrong = set(np.argsort(found)[:2000]) ^ set(np.argsort(expected)[:2000])
    assert len(wrong) <= 2 and len(np.unique(found)) > 3900


@pytest.mark.parametrize("lookahead", [2, 33])
def test_lookahead_is_a_sum_of_retentions(lookahead):
    ages = 1001.0 - POSITION[:, None, None] + np.arange(lookahead)
    with np.errstate(divide="ignore"):
        expected = np.log(np.exp(ages * LOG_BETA.astype(np.float64)[:, None]).sum(axis=-1))
    # Where the sum underflows even float64 its logarithm is no reference.
    there = np.isfinite(expected) & (expected > -700)
    assert there.sum() > there.size / 2
    np.testing.assert_allclose(grid(lookahead)[there], expected[there] - np.log(lookahead), rtol=2e-6, atol=2e-5)


def test_scores_fall_with_age_and_rise_with_beta():
    for lookahead in (1, 4):
        scores = grid(lookahead)
        assert (np.diff(scores, axis=1) <= 1e-5).all()
        assert (np.diff(scores[:, 3:], axis=0) > 0).all(), "of two entries with the same beta the newer is worth more"


def test_retention_stores_log_beta_and_is_gated():
    policy = policies.get("retention")
    log_beta = jnp.full((1, 1, 2, 3), -0.5)
    np.testing.assert_array_equal(policy.stat(written(np.zeros((1, 2)), np.arange(3), log_beta=log_beta)), log_beta)
    assert policy.gated and policy.sinks is None and policy.window == 0 and policy.floor == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(lookahead=0), "lookahead must be at least 1"),
        (dict(floor=-1), "floor must be 0 or more"),
        (dict(alpha=1.0), "alpha must be at least 0 and below 1"),
        (dict(alpha=-0.1), "alpha must be"),
        (dict(alpha=4.0, lookahead=4), "below 4, which is what an entry can be worth, got 4"),
    ],
)
def test_retention_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        policies.retention.policy(**arguments)


def test_alpha_is_of_the_worth_summed_over_the_lookahead():
    """METHOD section 4: keep s >= log alpha, s the log of a sum; the score is that of the mean, so an entry stays that scores log(alpha / n)."""
    policy = policies.get("retention:alpha=0.5,lookahead=4")
    assert policy.lowest == pytest.approx(-3 * np.log(2))
    ages = 1001 - POSITION[:, None, None] + np.arange(4)
    summed = np.exp(ages * LOG_BETA.astype(np.float64)[:, None]).sum(axis=-1)
    assert ((summed > 0.5) & (summed < 2)).any(), "or one of the mean does as well"
    np.testing.assert_array_equal(grid(4) >= policy.lowest, summed >= 0.5)


def test_window_keeps_sinks_and_the_newest():
    policy = policies.get("window")
    position = jnp.asarray(np.random.default_rng(0).permutation(100))
    scores = np.asarray(policy.score(jnp.zeros(100), position, 100))
    # Ranked as the cache ranks: the sinks are protected, then the best.
    order = sorted(range(100), key=lambda i: (position[i] >= policy.sinks, -scores[i]))
    assert sorted(int(position[i]) for i in order[:12]) == [0, 1, 2, 3, *range(92, 100)]
    assert policies.window.policy(sinks=2).sinks == 2 and not policy.gated
    # The order is exact far beyond any context.
    far = policy.score(jnp.zeros(3), jnp.array([2**24 - 2, 2**24 - 1, 2**24]), 2**24 + 1)
    assert (np.diff(far) > 0).all()


def random_stat(position, stream, seed=0):
    return np.asarray(policies.random.policy(seed).stat(written(position, stream)))[0]


def test_random_depends_on_stream_and_position_alone():
    """Not on the batch row, the neighbours, or what is written together with it: the same entry draws the same number."""
    whole = random_stat(np.arange(64)[None], np.arange(6))
    assert whole.shape == (1, 64, 6) and whole.dtype == np.float32
    np.testing.assert_array_equal(whole, random_stat(np.arange(64)[None], np.arange(6)))
    rows = random_stat([[5, 6], [60, 61], [5, 6]], [4, 1])
    np.testing.assert_array_equal(rows[0], rows[2])
    np.testing.assert_array_equal(rows[0], whole[0, 5:7][:, [4, 1]])
    np.testing.assert_array_equal(rows[1], whole[0, 60:62][:, [4, 1]])
    assert not np.array_equal(whole, random_stat(np.arange(64)[None], np.arange(6), seed=1))
    # The score is the number drawn at the writing, whatever the time.
    score = policies.get("random").score
    np.testing.assert_array_equal(score(whole, 0, 64), score(whole, 0, 10**6))


def test_random_is_uniform_and_independent():
    draws = random_stat(np.arange(4096)[None], np.arange(32))[0]
    assert (draws >= 0).all() and (draws < 1).all()
    # 131,072 draws in 16 bins: the chi-squared statistic has 15 degrees of freedom, and 45 is its 1 in 10,000.
    counts = np.bincount((draws * 16).astype(int).ravel(), minlength=16)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 45
    # Neighbouring positions, positions in order, and streams: correlations of 4096 independent pairs have a deviation of 1/64.
    assert np.abs(np.corrcoef(draws, rowvar=False) - np.eye(32)).max() < 5 / 64
    assert max(abs(np.corrcoef(draws[:-1, s], draws[1:, s])[0, 1]) for s in range(32)) < 5 / 64
    assert max(abs(np.corrcoef(np.arange(4096), draws[:, s])[0, 1]) for s in range(32)) < 5 / 64
    assert len(np.unique(draws)) > 0.99 * draws.size


def test_knorm_keeps_small_keys():
    np.testing.assert_allclose(policies.get("knorm").stat(written([[0, 1]], [0], keys=jnp.array([[[[[3.0, 4.0]], [[0.0, 1.0]]]]])))[0, 0, :, 0], [-5, -1])


SNAP = dict(streams=True, queries=32)
# What METHOD section 6 and the papers say, for a budget of 256 and 32 layers: the scope, the sinks, the newest tokens that are protected; what the model is
# asked for; and the numbers of the score.
DEFAULTS = {
    "full": (("global", 0, 0), {}, {}),
    "random": (("global", 0, 0), {}, {}),
    "window": (("global", 4, 0), {}, {}),
    "retention": (("global", None, 0), dict(gated=True), dict(lookahead=1)),
    "h2o": (("head", 0, 128), dict(attended=True), {}),
    "tova": (("head", 0, 1), dict(streams=True, queries=1), {}),
    "snapkv": (("head", 0, 32), SNAP, dict(kernel=7)),
    "pyramidkv": (("head", 0, 32), SNAP, dict(kernel=7, beta=20)),
    "ada_snapkv": (("layer", 0, 32), SNAP, dict(kernel=7, floor=0.2)),
    "knorm": (("head", 0, 0), {}, {}),
    "keydiff": (("head", 0, 0), dict(streams=True), {}),
    "expected_attention": (("head", 4, 0), dict(streams=True, moments=4), dict(future=512)),
    "lagkv": (("head", 4, 0), dict(streams=True), dict(lag=128)),
    "rkv": (("head", 0, 8), dict(streams=True, queries=8), dict(kernel=7, balance=0.1, threshold=0.5)),
    "kvzip": (("global", 4, 0), dict(reread=2048), {}),
    "epikv_flat": (("shared", 0, 64), dict(hidden=(10, 21), past=64), {}),
    "epikv_band": (("shared", 0, 64), dict(hidden=(*range(7, 14), *range(18, 26)), past=64), {}),
    "epikv_seg": (("shared", 0, 64), dict(streams=True, hidden=(10, 21), past=64), {}),
    "infokv": (("head", 0, 64), dict(streams=True, queries=64, hidden=tuple(range(32)), entropy=True), dict(kernel=9, alpha=0.9)),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_papers(name):
    policy, (protects, asks, numbers) = policies.get(name), DEFAULTS[name]
    window = int(policy.window(256)) if callable(policy.window) else policy.window
    assert (policy.scope, policy.sinks, window) == protects
    nothing = dict(streams=False, gated=False, queries=0, moments=None, hidden=None, past=0, entropy=False, attended=False, reread=0)
    assert {field: getattr(policy, field) for field in nothing} | ({"hidden": policy.hidden(32)} if policy.hidden else {}) == nothing | asks
    assert getattr(policy.score, "keywords", {}) | getattr(policy.layer_budgets, "keywords", {}) == numbers


def test_windows_that_are_a_share_of_the_budget_end_at_128():
    assert [int(policies.get("epikv_flat").window(budget)) for budget in (64, 512, 1024)] == [16, 128, 128]
    assert observations.TOP == 256  # of InfoKV's entropy


def test_registry(monkeypatch):
    monkeypatch.setattr(policies, "_REGISTRY", dict(policies._REGISTRY))
    assert policies.names() == sorted(policies.names()) and {"full", "random", "retention", "window"} <= set(policies.names())
    assert policies.get("full").score is None
    mine = policies.Policy(score=lambda stat, position, seen: stat)
    policies.register("mine", mine)
    assert policies.get("mine") is mine and "mine" in policies.names()
    with pytest.raises(ValueError, match="policy 'mine' is registered already; choose another name"):
        policies.register("mine", policies.get("full"))
    for name in (3, "", "a:b"):
        with pytest.raises(ValueError, match="a policy's name must be a text without ':' and ','"):
            policies.register(name, mine)
    for what in (3, lambda stat, position, seen: stat):
        with pytest.raises(ValueError, match="policy 'other' must be a Policy, as Policy"):
            policies.register("other", what)
    assert "other" not in policies.names()
    assert policies.get("mine") is mine


def test_options_of_a_name():
    """Arguments of the policy's own function, defaults for the rest; the same policy each time, as it is what programs are compiled for."""
    policy = policies.get("retention:lookahead=7,floor=3")
    assert policy.floor == 3 and policy.score.keywords == {"lookahead": 7} and policy.lowest == -np.inf
    assert policies.get("retention:alpha=0.5").lowest == np.log(0.5)
    assert policies.get("retention:lookahead=7,floor=3") is policy and policies.get("retention") is policies.get("retention")
    assert policies.get("infokv:alpha=1").window == 64 and policies.get("infokv:alpha=1").score.keywords == {"kernel": 9, "alpha": 1}
    theirs = policies.pyramidkv.policy(kvpress=True).layer_budgets(np.array([256]), np.array([1024]), 4, 32)
    np.testing.assert_array_equal(policies.get("pyramidkv:kvpress=True").layer_budgets(np.array([256]), np.array([1024]), 4, 32), theirs)
    assert not np.array_equal(policies.get("pyramidkv").layer_budgets(np.array([256]), np.array([1024]), 4, 32), theirs)


@pytest.mark.parametrize(
    "name, message",
    [
        ("retension", "unknown policy 'retension': did you mean retention\\? known are .*random, retention, rkv, snapkv, tova, window"),
        ("windows", "did you mean window\\?"),
        ("xyz", "unknown policy 'xyz': known are ada_snapkv, "),
        ("", "unknown policy '': known are ada_snapkv, "),
        (":floor=1", "unknown policy '': known are ada_snapkv, "),
        ("retention:flor=1", "unknown option of policy 'retention' 'flor': did you mean floor\\? known are lookahead, floor, alpha"),
        ("retention:floor", "option 'floor' of policy 'retention' must be of its default's kind, as in floor=0, got ''"),
        ("retention:floor=0.5", "as in floor=0, got '0.5'"),
        ("retention:lookahead=2,floor=many", "as in floor=0, got 'many'"),
        ("retention:lookahead=0", "lookahead must be at least 1 token, got 0"),
        ("retention:floor=1,floor=2", "option 'floor' of policy 'retention' is given twice, in 'floor=1,floor=2'"),
        ("snapkv:window={[]:1}", "option 'window' of policy 'snapkv' must be of its default's kind, as in window=32, got"),
        ("full:floor=1", "policy 'full' has no options, got 'floor=1'"),
        ("tova:window=1", "policy 'tova' has no options, got 'window=1'"),
        ("lagkv:sinks=-2", "a policy's sinks must be a whole number of tokens, 0 or more, got -2"),
        ("snapkv:window=-1", "window must be"),
        ("random:seed=-1", "seed must be a whole number from 0 to 2\\*\\*32 - 1, got -1"),
        ("random:seed=5000000000", "seed must be"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        policies.get(name)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(score="x"), "a policy's score must be a function or None, got 'x'"),
        (dict(stat=None), "a policy's stat must be a function, got None"),
        (dict(hidden=(1, 2)), r"a policy's hidden must be a function or None, got \(1, 2\)"),
        (dict(queries=2.5), "a policy's queries must be a whole number of tokens, 0 or more, got 2.5"),
        (dict(queries=-1), "queries must be a whole number"),
        (dict(moments=True), "moments must be a whole number"),
        (dict(past=None), "past must be a whole number"),
        (dict(past=3), "a policy's past, 3 tokens, is of hidden states: say in hidden of which blocks"),
        (dict(lowest=float("nan")), "a policy's lowest must be a score, or -inf for none, got nan"),
        (dict(lowest=None), "lowest must be a score"),
        (dict(scopes=("global", "nope")), "unknown scope of a policy 'nope'"),
    ],
)
def test_what_no_policy_can_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        policies.Policy(**{"score": None, **changes})


@pytest.mark.parametrize("blocks", [(7,), (0, -1), (), (1.0,), 1])
def test_blocks_that_a_model_has_not_are_named(small, blocks):
    mine = policies.Policy(score=lambda stat, position, seen: stat, hidden=lambda layers: blocks)
    with pytest.raises(ValueError, match=re.escape(f"asks for the outputs of blocks {blocks}; the model's are 0 to 2")):
        Rows(small, 1, 12, mine)


@pytest.mark.parametrize("changes", [dict(scopes=["global"]), dict(scope="head", scopes=("global",)), dict(scope="globe")])
def test_a_policys_scope_is_one_of_its_scopes(changes):
    with pytest.raises(ValueError, match="a policy's scopes must be a tuple that holds its scope"):
        policies.Policy(score=None, **changes)
