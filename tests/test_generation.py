"""Generation against its oracle: evicting equals the full cache masked at exactly the evicted entries, at every step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retention import cache, gates, policies, programs
from retention.evaluation import prose
from retention.model import bind
from retention.rows import Rows
from tests.conftest import small_config, small_model


def random_prompts(lengths, vocab=61, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


def rows(model, batch, budget, policy="retention", scope=None, chunk=16, sinks=None, window=None):
    return Rows(model, batch, budget, policy, scope, chunk, sinks, window)


def kept(run, row):
    return cache.kept_positions(run.cache, row)


def masked_full_logits(model, tokens, visible):
    """The oracle: one forward pass over the whole sequence, every query attending exactly to visible[layer, head, query, key]."""
    config = model.config

    def attend(carry, mask, q, k, v, h):
        logits = jnp.einsum("BTHGD,BIHD->BHGTI", q, k) * config.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(mask[None, :, None], logits, -jnp.inf), axis=-1)
        return carry, jnp.einsum("BHGTI,BIHD->BTHGD", weights, v), None

    decoder = bind(config, model.params)
    tokens = jnp.asarray(tokens)[None]
    hidden, _, _ = decoder(tokens, jnp.arange(tokens.shape[1])[None], attend, layer_inputs=jnp.asarray(visible))
    return np.asarray(decoder.logits(hidden)[0])


class Recorder:
    """Runs Rows chunk by chunk and token by token, noting for every query which positions each stream held."""

    def __init__(self, run, prompts, steps, questions=None):
        self.run, config = run, run.model.config
        batch, total = len(prompts), max(map(len, prompts)) + steps + max(map(len, questions or [()]))
        self.visible = np.zeros((batch, config.layers, config.kv_heads, total, total), bool)
        self.tokens, self.logits = [list(prompt) for prompt in prompts], [[] for _ in prompts]
        chunk = run.width
        for begin in range(0, max(map(len, prompts)), chunk):
            parts = [prompt[begin : begin + chunk] for prompt in prompts]
            for row, part in enumerate(parts):
                for query in range(begin, begin + len(part)):
                    self.note(row, query, range(begin, query + 1))
            run.append(parts)
        if questions:
            for row, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
                for query in range(len(prompt), len(prompt) + len(question)):
                    self.note(row, query, range(len(prompt), query + 1))
                self.tokens[row] += question
            run.append(questions, answer=steps)
        run.piece = 1
        self.evictions = 0
        for piece in run.decode(steps, 0.0, 1.0, 0, stop=()):
            for row in range(batch):
                self.tokens[row].append(int(piece[row, 0]))
                self.note(row, len(self.tokens[row]) - 1, ())
                self.logits[row].append(np.asarray(run.logits[row]))

    def note(self, row, query, extra):
        if self.run.cache is not None:
            for layer, heads in enumerate(kept(self.run, row)):
                for head, positions in enumerate(heads):
                    self.visible[row, layer, head, query, positions] = True
        self.visible[row, :, :, query, list(extra)] = True


SETTINGS = [
    ("global", "retention", None, None),
    ("global", "retention", 2, 3),
    pytest.param("layer", "retention", None, None, marks=pytest.mark.slow),
    ("layer", "retention", 2, 3),
    pytest.param("head", "retention", None, None, marks=pytest.mark.slow),
    ("head", "retention", 2, 3),
    pytest.param("shared", "retention", None, None, marks=pytest.mark.slow),
    ("shared", "retention", 2, 3),
    ("global", "window", None, None),
    pytest.param("head", "random", None, None, marks=pytest.mark.slow),
    ("global", policies.retention.policy(lookahead=4, floor=3), 1, 0),
    ("layer", policies.retention.policy(alpha=0.3), 1, 2),
]


@pytest.mark.parametrize("scope, policy, sinks, window", SETTINGS)
def test_evicting_equals_the_masked_full_cache_at_every_step(small, scope, policy, sinks, window):
    prompts, steps = random_prompts([50, 33, 7]), 200
    record = Recorder(rows(small, 3, 12, policy, scope, 16, sinks, window), prompts, steps)
    for row, prompt in enumerate(prompts):
        total = len(prompt) + steps
        visible = record.visible[row, :, :, :total, :total]
        # The mask must bite, or the oracle proves nothing.
        assert visible[:, :, -1].sum() < small.config.streams * total / 4
        expected = masked_full_logits(small, record.tokens[row], visible)[len(prompt) :]
        difference = np.abs(np.stack(record.logits[row]) - expected).max()
        assert difference <= 1e-5 * np.ptp(expected)
        if sinks:
            assert visible[:, :, -1, :sinks].all()
        if window:
            assert visible[:, :, -1, -window:].all()


@pytest.mark.parametrize("policy", ["knorm", "retention", pytest.param("kvzip", marks=pytest.mark.slow)])
def test_a_question_is_whole_until_it_is_answered(small, policy):
    """It stays in the write buffer, of 16 tokens where it has room there, also where the policy would not keep it, until the answer has more or ends."""
    prompts, questions, steps = random_prompts([50, 33]), random_prompts([39, 4]), 60
    run = rows(small, 2, 12, policy, sinks=0)
    for context in (prompts, questions):
        run.append(context, None if context is prompts else steps)
    for row, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
        asked = list(range(len(prompt), len(prompt) + len(question)))
        assert all(stream.tolist()[-len(asked) :] == asked for layer in kept(run, row) for stream in layer)
    again = run.fork()
    again.append(random_prompts([3, 2]))
    assert cache.kept_entries(again.cache).tolist() == [12 * small.config.streams] * 2, "the next turn begins with a selection"

    record = Recorder(rows(small, 2, 12, policy, sinks=0), prompts, steps, questions)
    assert cache.kept_entries(record.run.cache).tolist() == [12 * small.config.streams] * 2, "and an answer ends with one"
    assert record.run.cache.buffer_position.shape == (2, 16), "as long as before the question"
    for row, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
        total = len(prompt) + len(question) + steps
        visible = record.visible[row, :, :, :total, :total]
        asked = slice(len(prompt), total - steps)
        assert visible[:, :, total - steps : total - steps + 16, asked].all()
        assert not visible[:, :, total - 1, asked].all()
        expected = masked_full_logits(small, record.tokens[row], visible)[total - steps :]
        assert np.abs(np.stack(record.logits[row]) - expected).max() <= 1e-5 * np.ptp(expected)


def test_kvzip_reads_a_question_and_its_answer_again_before_they_compete(small):
    """As were they appended: else they would outrank the context, turn after turn."""
    contexts, questions = random_prompts([50, 33]), random_prompts([20, 9])
    asked, told = (rows(small, 2, 12, "kvzip", None, 64) for _ in range(2))
    for run in (asked, told):
        run.append(contexts)
    asked.append(questions, answer=30)
    answers = asked.decode_all(30, 0.0, 1.0, 0, stop=())
    told.append([question + answer for question, answer in zip(questions, answers, strict=True)])
    for row in range(2):
        for layer, other in zip(kept(asked, row), kept(told, row), strict=True):
            assert [stream.tolist() for stream in layer] == [stream.tolist() for stream in other]


OTHERS = (("layer", "keydiff"), ("head", "pyramidkv"), ("head", "rkv"), ("global", "kvzip"))


@pytest.mark.parametrize("scope, policy", [("global", "retention"), *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS)])
def test_questions_of_unequal_lengths_are_answered_as_among_their_like(small, scope, policy):
    """Each sequence evicts when its own question and answer have filled its own room, whoever is beside it, and however long their questions are."""
    contexts, questions = random_prompts([90, 60]), random_prompts([70, 20])

    def answered(some):
        run = rows(small, 2, 40, policy, scope, 32, sinks=1, window=4)
        run.append([contexts[i] for i in some])
        run.append([questions[i] for i in some], answer=20)
        entries, tokens = [], []
        for piece in run.decode(90, 0.0, 1.0, 0, stop=()):
            tokens.append(piece)
            entries.append(cache.kept_entries(run.cache))
        return np.concatenate(tokens, axis=1), np.array(entries), [kept(run, row) for row in range(2)]

    tokens, entries, ends = answered([0, 1])
    evictions = np.diff(entries, axis=0) < 0
    assert evictions.any(axis=0).all() and not np.array_equal(*evictions.T)
    for i in range(2):
        own_tokens, own_entries, own_ends = answered([i, i])
        assert own_tokens[i].tolist() == tokens[i].tolist() and own_entries[:, i].tolist() == entries[:, i].tolist()
        for a, b in zip(sum(ends[i], []), sum(own_ends[i], []), strict=True):
            assert a.tolist() == b.tolist()


def test_evicted_entries_change_the_answer(small):
    """Were eviction a mask that does nothing, the oracle above would pass: the budgeted logits must differ from the full cache's."""
    prompt = random_prompts([80])
    runs = [rows(small, 1, budget) for budget in (12, None)]
    for run in runs:
        run.append(prompt)
    assert np.abs(runs[0].logits - runs[1].logits).max() > 1e-2


def test_one_shot_equals_chunked_when_nothing_is_evicted(small):
    prompts = random_prompts([70, 41])
    full = small.logits(np.array([prompts[0]]))[0, -1]
    for run in (rows(small, 2, None), rows(small, 2, 100, chunk=16), rows(small, 2, 100, chunk=None), rows(small, 2, 100, chunk=7)):
        run.append(prompts)
        np.testing.assert_allclose(run.logits[0], full, atol=2e-5)
        assert [len(stream) for layer in kept(run, 1) for stream in layer] == [41] * small.config.streams


@pytest.mark.parametrize("scope, budget", [("global", None), ("global", 12), ("global", 0.25), ("shared", 12)])
def test_a_batch_equals_its_rows_alone(small, scope, budget):
    prompts = random_prompts([50, 9, 33], seed=1)

    def run(prompts):
        r = rows(small, len(prompts), budget, scope=scope)
        r.append(prompts)
        tokens = np.concatenate(list(r.decode(40, 0.0, 1.0, 0, stop=(3, 17))), axis=1)
        return r, [row[row >= 0].tolist() for row in tokens]

    together, tokens = run(prompts)
    assert len({len(row) for row in tokens}) > 1, "the rows should end at different times"
    for i, prompt in enumerate(prompts):
        alone, alone_tokens = run([prompt])
        assert alone_tokens[0] == tokens[i]
        assert together.stats(i).kept_entries == alone.stats(0).kept_entries
        assert together.stats(i).seen_tokens == alone.stats(0).seen_tokens == len(prompt) + len(tokens[i])
        for a, b in zip(sum(kept(together, i), []), sum(kept(alone, 0), []), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("policy", ["retention", pytest.param("h2o", marks=pytest.mark.slow)])
def test_a_sequence_that_ends_as_its_buffer_is_full_stays_as_it_is(small, policy):
    """While another goes on, whose steps are written behind its last entry too."""
    prompts, seed = random_prompts([40, 40]), 2
    run, alone = rows(small, 2, 12, policy), rows(small, 1, 12, policy)
    run.append(prompts)
    alone.append(prompts[:1])
    stop = run.fork().decode_all(16, 1.0, 1.0, seed, stop=())[0][15]
    lengths = [len(tokens) for tokens in run.decode_all(60, 1.0, 1.0, seed, stop=[stop])]
    assert lengths[0] == run.width == 16 and lengths[1] > 17, "the row should end with its buffer, and before the other: take another seed"
    alone.decode_all(60, 1.0, 1.0, seed, stop=[stop])
    more = random_prompts([9, 5], seed=1)
    for turn in ([[], []], more):
        run.append(turn)
        alone.append(turn[:1])
        seen, live = 56 + len(turn[0]), alone.stats(0).kept_entries
        assert run.stats(0) == alone.stats(0) and seen == alone.stats(0).seen_tokens
        np.testing.assert_array_equal(run.cache.position[0, :live], alone.cache.position[0, :live])
        np.testing.assert_allclose(run.cache.stat[0, :live], alone.cache.stat[0, :live], rtol=1e-4)


def test_positions_go_on_from_the_tokens_seen(small):
    """The field's most repeated bug: after eviction the next position is what was seen, not what is kept."""
    run = rows(small, 1, 12)
    run.append(random_prompts([80]))
    assert int(run.cache.seen[0]) == 80
    run.append(random_prompts([1], seed=2))
    assert max(int(stream.max()) for layer in kept(run, 0) for stream in layer) == 80


def test_turns_equal_one_prompt_under_the_full_cache(small):
    first, second = random_prompts([30, 25], seed=3)
    turns, whole = rows(small, 1, None), rows(small, 1, None)
    turns.append([first])
    turns.append([second])
    whole.append([first + second])
    np.testing.assert_allclose(turns.logits, whole.logits, atol=2e-5)


def test_the_decode_loop_compiles_once_whatever_the_prompt(small):
    model = small_model(small_config(vocab_size=67))
    before = programs.decode._cache_size()
    for lengths, temperature, steps in ([5, 9], 0.0, 3), ([40, 64], 0.7, 40), ([100, 1], 0.0, 17):
        run = rows(model, 2, 12)
        run.append(random_prompts(lengths))
        list(run.decode(steps, temperature, 0.9, 0, stop=()))
    assert programs.decode._cache_size() == before + 1


def test_prefill_compiles_once_for_each_chunk_length(small):
    model = small_model(small_config(vocab_size=71))
    before = programs.prefill._cache_size()
    for length in (64, 256, 640):
        run = rows(model, 1, 12, chunk=64)
        run.append(random_prompts([length]))
    assert programs.prefill._cache_size() == before + 1


@pytest.mark.parametrize("scope", ["global", "layer", "head", "shared"])
def test_live_entries_equal_the_budget(small, scope):
    run = rows(small, 2, 12, scope=scope)
    run.append(random_prompts([100, 5]))
    streams = small.config.streams
    assert run.stats(0).kept_entries == 12 * streams == run.stats(0).capacity
    assert run.stats(1).kept_entries == 5 * streams
    lengths = np.array([[len(stream) for stream in layer] for layer in kept(run, 0)])
    if scope == "layer":
        assert (lengths.sum(axis=1) == 12 * small.config.kv_heads).all()
    if scope in ("head", "shared"):
        assert (lengths == 12).all()
    if scope == "global":
        assert len(np.unique(lengths)) > 1, "a global budget should be shared unevenly"
    if scope == "shared":
        assert len({tuple(stream) for layer in kept(run, 0) for stream in layer}) == 1


def test_floor_and_fraction(small):
    run = rows(small, 2, 0.25, policies.retention.policy(floor=4))
    run.append(random_prompts([100, 60]))
    assert [run.stats(i).kept_entries for i in (0, 1)] == [25 * small.config.streams, 15 * small.config.streams]
    assert min(len(stream) for layer in kept(run, 0) for stream in layer) >= 4


def test_what_is_worth_too_little_goes_within_the_budget_too(small):
    """At the last selection; those before it took only what would be worth less still."""
    alpha, budgets, trained = 0.3, (60, 80), small.gates
    forgetful = dataclasses.replace(trained, params={**trained.params, "bias": trained.params["bias"] - 9})
    model = dataclasses.replace(small, gates=forgetful)
    runs = [rows(model, 1, budget, policies.retention.policy(alpha=alpha), sinks=1) for budget in budgets]
    for run in runs:
        run.append(random_prompts([100]))
        stored, seen = run.cache, run.stats(0).seen_tokens
        live = slice(0, int(stored.starts[0, -1]))
        worth = np.exp((seen - stored.position[0, live]) * stored.stat[0, live])
        assert 0 < live.stop < run.stats(0).capacity and ((worth >= alpha * (1 - 1e-6)) | (stored.position[0, live] == 0)).all()
    assert [k.tolist() for layer in kept(runs[0], 0) for k in layer] == [k.tolist() for layer in kept(runs[1], 0) for k in layer], "no budget was full"
    most = model.config.max_positions
    assert rows(model, 1, most, "retention:alpha=0.3").evicts and not rows(model, 1, most).evicts


def test_allocated_bytes_are_those_of_the_arrays(small):
    for budget in (12, None):
        run = rows(small, 2, budget)
        run.append(random_prompts([100, 60]))
        assert run.stats(0).allocated_bytes * 2 == sum(leaf.nbytes for leaf in jax.tree.leaves(run.cache))
    # Memory follows the budget, not the context: S (M + W) entries of K, V, stat and position, and a few bytes of bookkeeping.
    config, run = small.config, rows(small, 1, 12)
    run.append(random_prompts([1000]))
    entries = config.streams * (12 + 16)
    assert run.stats(0).allocated_bytes <= 1.05 * entries * (2 * 4 * config.head_dim + 8)


def test_bfloat16_cache_follows_the_model(small):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small.params)
    model = dataclasses.replace(small, params=params)
    run = rows(model, 1, 12)
    run.append(random_prompts([100]))
    assert run.cache.keys.dtype == jnp.bfloat16 and run.cache.stat.dtype == jnp.float32
    expected = rows(small, 1, 12)
    expected.append(random_prompts([100]))
    assert np.corrcoef(run.logits[0], expected.logits[0])[0, 1] > 0.9


@pytest.mark.parametrize("group", [1, 3])
def test_other_head_groupings(group):
    model = small_model(small_config(query_heads=2 * group, qk_norm=True, qkv_bias=True))
    run = rows(model, 1, 100)
    prompt = random_prompts([40])
    run.append(prompt)
    np.testing.assert_allclose(run.logits[0], model.logits(np.array(prompt))[0, -1], atol=2e-5)


def test_streams_may_outgrow_the_prompt_while_they_are_decoded(small):
    """Policies see whole streams, which under one budget for all may be longer than any was when the prompt had been read."""
    config = small.config
    policy = policies.Policy(  # the first stream keeps its even positions, and the others what is left
        score=lambda streams: jnp.where(streams.stat == 0, 1000.0 - 2000.0 * (streams.position % 2), 1.0 * streams.position),
        stat=lambda written: jnp.broadcast_to(written.stream, (config.layers, *written.position.shape, config.kv_heads)).astype(jnp.float32),
        streams=True,
    )
    run = rows(small, 1, 10, policy)
    run.append(random_prompts([5]))
    run.decode_all(50, 0.0, 1.0, 0, ())
    assert kept(run, 0)[0][0].tolist() == list(range(0, 55, 2))


def test_a_question_stays_until_its_answer_ends(small):
    run = rows(small, 1, 12, "knorm", chunk=32)
    run.append(random_prompts([50]))
    run.append(random_prompts([10]), answer=20)
    for _ in run.decode(20, 0.0, 1.0, 0, stop=()):
        assert all(set(range(50, 60)) <= set(stream.tolist()) for layer in kept(run, 0) for stream in layer)


def test_a_budget_may_be_just_what_is_protected(small):
    run = rows(small, 1, 6, "window", sinks=4, window=2)
    run.append(random_prompts([30]))
    assert all(stream.tolist() == [0, 1, 2, 3, 28, 29] for layer in kept(run, 0) for stream in layer)


class TestSampling:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))

    def draw(self, temperature, top_p, count=2000):
        keys = jax.random.split(jax.random.key(0), count)
        tokens = programs.sample(jnp.tile(self.logits, (count, 1)), keys, jnp.float32(temperature), jnp.float32(top_p))
        return np.bincount(tokens, minlength=4) / count

    def test_greedy(self):
        np.testing.assert_array_equal(self.draw(0.0, 1.0), [1, 0, 0, 0])

    def test_temperature_one_follows_the_probabilities(self):
        np.testing.assert_allclose(self.draw(1.0, 1.0), [0.5, 0.3, 0.15, 0.05], atol=0.04)

    def test_temperature_is_what_the_logits_are_divided_by(self):
        np.testing.assert_allclose(self.draw(0.5, 1.0), [0.685, 0.247, 0.062, 0.007], atol=0.04)

    def test_every_token_of_every_row_has_noise_of_its_own(self, small):
        """At such a temperature all logits are alike, and the noise alone decides."""
        run = rows(small, 2, 12)
        run.append(2 * random_prompts([20]))
        tokens = np.concatenate(list(run.decode(20, 1e4, 1.0, 0, stop=())), axis=1)
        assert not np.array_equal(*tokens) and all(len(set(row.tolist())) > 10 for row in tokens)

    def test_top_p_keeps_the_fewest_tokens_that_reach_it(self):
        np.testing.assert_allclose(self.draw(1.0, 0.7), [0.625, 0.375, 0, 0], atol=0.04)
        np.testing.assert_array_equal(self.draw(1.0, 0.1), [1, 0, 0, 0])
        np.testing.assert_array_equal(self.draw(0.5, 0.6), [1, 0, 0, 0])  # of the probabilities at that temperature

    def test_a_seed_repeats_and_another_differs(self, small):
        def tokens(seed):
            run = rows(small, 1, 12)
            run.append(random_prompts([20]))
            return np.concatenate(list(run.decode(20, 1.0, 1.0, seed, stop=())), axis=1).tolist()

        assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(budget=0), "budget must be at least 1"),
        (dict(budget=-3), "budget must be at least 1"),
        (dict(budget=1.5), "fractional budget must be in"),
        (dict(budget=0.0), "fractional budget must be in"),
        (dict(budget="many"), "budget must be a whole number"),
        (dict(budget=True), "budget must be a whole number"),
        (dict(budget=4, sinks=3, window=2), r"budget 4 is smaller than sinks \+ window"),
        (dict(budget=3, policy="window"), r"budget 3 is smaller than sinks \+ window = 4 \+ 0"),
        (dict(budget=2, policy=policies.retention.policy(floor=3)), r"sinks \+ window \+ floor = 0 \+ 0 \+ 3"),
        (dict(budget=8, scope="head", policy=policies.retention.policy(floor=3)), "scope='global'"),
        (dict(budget=8, policy="retention:floor=2,alpha=0.5"), "a floor, .* or a lowest score .alpha., .* not both"),
        (dict(budget=8, policy=policies.Policy(score=None, layer_budgets=lambda *_: None)), "layer_budgets needs scope='head', got scope='global'"),
        (dict(budget=None, policy="retention:alpha=0.5"), "needs a budget, the most that it may keep, got budget=None"),
        (dict(budget=8, scope="globe"), "unknown scope 'globe': did you mean global"),
        (dict(budget=8, policy="retension"), "did you mean retention"),
        (dict(budget=8, policy=None), "policy must be one of ada_snapkv, .* full, "),
        (dict(budget=8, sinks=-1), "sinks must be"),
        (dict(budget=8, chunk=0), "prefill_chunk must be at least 1"),
    ],
)
def test_bad_arguments_are_named(small, arguments, message):
    with pytest.raises(ValueError, match=message):
        rows(small, 1, **arguments)


def test_logits_that_are_no_numbers_are_refused(small):
    """Of NaN the first token would be chosen, which may be one that ends."""
    run = rows(dataclasses.replace(small, params={**small.params, "norm": small.params["norm"] * np.nan}), 2, 12)
    run.append(random_prompts([9, 5]))
    sound = rows(small, 2, 12)
    sound.append(random_prompts([9, 5]))
    sound.logits = sound.logits.at[1, 7].set(jnp.inf)  # one of one sequence is enough
    for one in (run, sound):
        with pytest.raises(ValueError, match="the model's logits are NaN or infinite: its weights are damaged, or beyond float32"):
            one.decode_all(8, 0.0, 1.0, 0, stop=())


def test_local_gates_rank_within_each_head(small):
    local = dataclasses.replace(small, gates=gates.TrainedGates(gates.GateConfig("local", width=16), {}))
    assert [rows(local, 1, 12, policy).plan.scope for policy in ("retention", "window", "retention:lookahead=8")] == ["head", "global", "head"]
    assert rows(local, 1, 12, scope="global").plan.scope == rows(small, 1, 12).plan.scope == "global"


def test_retention_without_gates_is_refused(small):
    bare = dataclasses.replace(small, gates=None)
    with pytest.raises(ValueError, match="learned gates and the model has none"):
        rows(bare, 1, 12)
    rows(bare, 1, 12, "window")
    rows(bare, 1, None)


@pytest.mark.parametrize(
    "shares, message",
    [
        (lambda M, layers: jnp.stack([2 * M] * layers, 1), r"must be 10 on average, here 4 at least and 20 at most, got \[20, 20, 20\]"),  # more than there is
        (lambda M, layers: jnp.stack([M - 4] * layers, 1), r"got \[6, 6, 6\]"),  # slots that nothing fills
        (lambda M, layers: jnp.stack([2 * M, M, 0 * M], 1), r"got \[20, 10, 0\]"),  # no room for what is protected
        (lambda M, layers: jnp.stack([3 * M - 8, 0 * M + 4, 0 * M + 4], 1), r"got \[22, 4, 4\]"),
        (lambda M, layers: jnp.array([12, 10, 8]), r"layer_budgets must return one number a sequence and layer, an array of shape \(1, 3\), got \(3,\)"),
    ],
)
def test_layer_budgets_are_the_pools(small, shares, message):
    policy = policies.Policy(lambda stat, *_: stat, scope="head", layer_budgets=lambda budget, seen, layers, protected: shares(budget, layers))
    run = rows(small, 1, 10, policy, sinks=1, window=3)
    with pytest.raises(ValueError, match=message):
        run.append(random_prompts([30]))


@pytest.mark.parametrize("policy", ["retention", "kvzip"])
def test_scoring_is_appending_a_chunk(small, policy):
    more = np.array(random_prompts([16, 16], seed=1))
    scored, appended = rows(small, 2, 12, policy), rows(small, 2, 12, policy)
    for run in (scored, appended):
        run.append(random_prompts([40, 33]))
    before, expected = np.asarray(scored.logits), prose.continuation_logits(scored, more)
    predicted = scored.score(more)
    appended.append(more.tolist())
    np.testing.assert_array_equal(predicted[:, 0], before)
    np.testing.assert_allclose(predicted[:, 1:], expected, atol=1e-4)
    np.testing.assert_allclose(scored.logits, appended.logits, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, [kept(scored, row) for row in (0, 1)], [kept(appended, row) for row in (0, 1)])
    with pytest.raises(ValueError, match="tokens must be at most 16 a sequence"):
        scored.score(np.zeros((2, 17), int))


@pytest.mark.parametrize(
    "asks", [{}, {"attended": True}, {"entropy": True}, {"hidden": lambda layers: (1,)}], ids=["gates", "attention", "entropy", "hidden"]
)
def test_what_is_decoded_is_rated_as_what_is_read(small, asks):
    """In decoding gates wait for the end of a piece, and in a batch some sequences end before it."""

    def stat(written):
        rated = written.log_beta + written.keys[..., 0] + 0.1 * written.position[None, :, :, None] + written.stream
        rated = rated if written.entropy is None else rated + written.entropy[None, ..., None]
        return rated if written.hidden is None else rated + written.hidden[0, :, :, :1][None]

    policy = policies.Policy(score=lambda stat, position, seen: stat, stat=stat, gated=True, **asks)
    decoded, read = rows(small, 2, 128, policy, chunk=32), rows(small, 2, 128, policy, chunk=32)
    for run in (decoded, read):
        run.append(random_prompts([40, 23]))
    tokens = decoded.decode_all(20, 1.0, 1.0, seed=0, stop=range(5))
    shorter, longer = sorted(map(len, tokens))
    assert shorter < decoded.piece < longer
    read.append(tokens)
    for row in (0, 1):
        jax.tree.map(np.testing.assert_array_equal, kept(decoded, row), kept(read, row))
        live = int(read.cache.starts[row, -1])
        np.testing.assert_allclose(decoded.cache.stat[row, :live], read.cache.stat[row, :live], rtol=1e-4, atol=1e-4)


def test_a_budget_larger_than_the_context_is_the_full_cache(small):
    run, full = rows(small, 1, 10**9), rows(small, 1, None)
    for r in (run, full):
        r.append(random_prompts([60]))
    np.testing.assert_array_equal(run.logits, full.logits)
    assert run.stats(0) == full.stats(0)


@pytest.mark.parametrize("budget, policy", [(None, "full"), (40, "h2o")])
def test_a_long_answer_and_many_turns_are_few_programs(small, budget, policy):
    """What grows with what is seen grows in steps, and the host counts only what was generated."""
    run = rows(small, 2, budget, policy)
    run.append(random_prompts([5, 3]))
    before = programs.decode._cache_size(), programs.prefill._cache_size()
    tokens = run.decode_all(420, 0.0, 1.0, 0, ())
    assert [len(row) for row in tokens] == [420, 420] and programs.decode._cache_size() - before[0] <= 2
    for _ in range(12):
        run.append(random_prompts([20, 20]))
        run.decode_all(3, 0.0, 1.0, 0, ())
    assert programs.decode._cache_size() - before[0] <= 6 and programs.prefill._cache_size() - before[1] <= 6
    assert run.seen.tolist() == run.cache.seen.tolist() == [5 + 420 + 12 * 23, 3 + 420 + 12 * 23]
    first = int(np.argmax(run.logits[0]))
    run.decode_all(100, 0.0, 1.0, 0, [first])
    assert run.seen.tolist() == run.cache.seen.tolist() and run.seen[0] == 5 + 420 + 12 * 23 + 1


def test_fractions_are_whole_where_they_should_be(small):
    assert [rows(small, 1, fraction).budgets([100]) for fraction in (0.29, 0.57, 0.125, 0.001)] == [[29], [57], [12], [1]]


def test_going_beyond_the_trained_length_warns_once():
    run = rows(small_model(small_config(max_positions=50)), 1, 8)
    with pytest.warns(UserWarning, match="beyond the 50") as caught:
        run.append(random_prompts([40]))
        run.append(random_prompts([40]))
        run.append(random_prompts([40]))
    assert len(caught) == 1
    whole = rows(small_model(small_config(max_positions=50)), 1, 60)
    with pytest.warns(UserWarning, match="beyond the 50 that this model was trained for, and a budget of 60, which is no smaller, evicts none of them"):
        whole.append(random_prompts([80]))


def test_a_registered_policy_works_by_name(small):
    policies.register("oldest", policies.Policy(score=lambda stat, position, seen: -1.0 * jnp.broadcast_to(position, stat.shape)))
    run = rows(small, 1, 12, "oldest")
    run.append(random_prompts([100]))
    assert all(stream.tolist() == list(range(12)) for layer in kept(run, 0) for stream in layer)
    with pytest.raises(ValueError, match="registered already"):
        policies.register("oldest", policies.get("full"))
    for scores in (dict(score=lambda stat, position, seen: 1.0 * seen), dict(score=lambda streams: 1.0 * streams.position[:, :1], streams=True)):
        with pytest.raises(ValueError, match=r"a policy's score must return one number an entry, an array of shape \(1, .*, got \(1, 1"):
            rows(small, 1, 12, policies.Policy(**scores)).append(random_prompts([100]))
    flat = policies.Policy(score=lambda stat, position, seen: stat, stat=lambda written: 1.0 * written.position[None, :, :, None])
    with pytest.raises(ValueError, match=r"a policy's stat must return one number an entry, an array of shape \(3, 1, 16, 2\), got \(1, 1, 16, 1\)"):
        rows(small, 1, 12, flat).append(random_prompts([100]))
    assert functools.reduce(lambda a, b: a and b in policies.names(), ("full", "oldest", "random", "retention", "window"), True)
