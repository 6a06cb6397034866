"""The slot pool against a plain-Python cache that keeps lists, and its parts against numpy's sort."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from retention import cache as cache_lib
from retention.cache import HIGHEST, LOWEST
from retention.rows import Rows

INT_MAX, INT_MIN = int(HIGHEST), int(LOWEST)
quick = settings(max_examples=15, deadline=None)


# The parts.

floor_mask = jax.jit(cache_lib.floor_mask, static_argnames="floor")


@pytest.mark.parametrize("values", [4, 1000])
@pytest.mark.parametrize("floor", [1, 3])
def test_floor_mask_keeps_the_best_of_each_stream(floor, values):
    """METHOD section 4's rule, with many ties too: a plain top-k of k - S*floor, then in each stream as many as it has there, and `floor`."""
    random, streams = np.random.default_rng(0), 3
    stream = np.sort(random.permuted(np.tile(np.repeat(np.arange(streams, dtype=np.int32), 20), (20, 1)), axis=1)[:, :50], axis=1)
    keys, k = random.integers(0, values, stream.shape).astype(np.int32), random.integers(streams * floor, 25, 20).astype(np.int32)
    keys[:, ::7] = INT_MIN
    found = np.asarray(floor_mask(keys, stream, k, floor=floor))
    for row in range(len(k)):
        best = sorted((i for i in range(50) if keys[row, i] > INT_MIN), key=lambda i: (-int(keys[row, i]), i))
        counts = np.bincount([stream[row, i] for i in best[: k[row] - streams * floor]], minlength=streams)
        kept = [i for s in range(streams) for i in [i for i in best if stream[row, i] == s][: counts[s] + floor]]
        assert np.flatnonzero(found[row]).tolist() == sorted(kept)
        assert len(kept) == k[row]


# The whole, against lists.

L, H, D, B, T, W, MOST = 2, 3, 5, 2, 6, 12, 5  # shapes are fixed: one program for each kind of selection
S = L * H
C = S * MOST + 3  # three slots more than are ever used: a full pool's last group is followed by dead ones


def by_stat(stat, position, seen):
    """A score that every float32 step of which is exact, and that changes with time, so that an entry's rank may."""
    return stat * (seen - position)


@functools.partial(jax.jit, static_argnames=("scope", "sinks", "window", "floor", "lowest"))
def select(cache, scope, sinks=0, window=0, floor=0, lowest=-np.inf, due=None):
    return cache_lib.select(cache, cache_lib.entry_scores(cache, by_stat), scope, sinks, window, floor, lowest=lowest, due=due)


append = jax.jit(cache_lib.append)


def entries(seen, stat, valid):
    """New tokens whose keys and values say where they belong; padding is NaN."""
    layer, row, token, head = np.meshgrid(*map(np.arange, (L, B, T, H)), indexing="ij")
    position = seen[row] + token
    keys = np.stack([layer, head, position, row, stat], axis=-1).astype(np.float32)
    padding = token >= valid[row]
    keys[padding] = np.nan
    return keys, -keys, np.where(padding, np.nan, stat).astype(np.float32)


def poison(cache):
    """The same cache with NaN, and positions that look protected, in everything that is dead."""
    dead = np.arange(cache.keys.shape[1]) >= np.asarray(cache.starts[:, -1:])
    dead_row = np.arange(cache.buffer_position.shape[1]) >= np.asarray(cache.buffered)[:, None]
    dead_buffer = dead_row[None, :, None]
    return cache._replace(
        keys=jnp.where(dead[..., None], jnp.nan, cache.keys),
        values=jnp.where(dead[..., None], jnp.nan, cache.values),
        stat=jnp.where(dead, jnp.nan, cache.stat),
        position=jnp.where(dead, -1, cache.position),
        buffer_keys=jnp.where(dead_buffer[..., None], jnp.nan, cache.buffer_keys),
        buffer_values=jnp.where(dead_buffer[..., None], jnp.nan, cache.buffer_values),
        buffer_stat=jnp.where(dead_buffer, jnp.nan, cache.buffer_stat),
        buffer_position=jnp.where(dead_row, -1, cache.buffer_position),
    )


class Lists:
    """One sequence's cache as lists of (position, stat), oldest first, a pool and a buffer for each stream."""

    def __init__(self, budget):
        self.budget, self.seen = budget, 0
        self.pool, self.buffer = [[] for _ in range(S)], [[] for _ in range(S)]

    def append(self, stat):
        """stat [L, T, H]"""
        for stream in range(S):
            new = stat[stream // H, :, stream % H]
            self.buffer[stream] += [(self.seen + i, float(value)) for i, value in enumerate(new)]
        self.seen += stat.shape[1]

    def best(self, found, limit, sinks, window, lowest=-np.inf):
        """The first `limit` of found, a list of (score, position, entry) in slot order: protected ones, then high scores, then slot order.

        Without those that are not protected and score below `lowest`.
        """

        def rank(item):
            score, position, _ = item
            return position >= sinks and position < self.seen - window, -(-np.inf if np.isnan(score) else score)

        return {entry for _, _, entry in sorted((item for item in found if not rank(item)[0] or -rank(item)[1] >= lowest), key=rank)[:limit]}

    def score(self, entry):
        return np.float32(entry[1]) * np.float32(self.seen - entry[0])

    def candidates(self, streams):
        """(score, position, (stream, position)) in slot order: the pool's, then the buffer's."""
        return [(self.score(e), e[0], (s, e[0])) for source in (self.pool, self.buffer) for s in streams for e in source[s]]

    def select(self, scope, sinks=0, window=0, floor=0, lowest=-np.inf):
        if scope == "shared":
            # Integer stats have exact sums, and dividing by S changes no order.
            tokens = [
                (sum(self.score(source[s][i]) for s in range(S)), source[0][i][0], source[0][i][0])
                for source in (self.pool, self.buffer)
                for i in range(len(source[0]))
            ]
            chosen = self.best(tokens, self.budget, sinks, window, lowest * S)  # of sums
            kept = {(s, position) for s in range(S) for position in chosen}
        elif floor:
            # METHOD section 4: a global top over S*(M - floor), then each stream gets its count + floor.
            top = self.best(self.candidates(range(S)), S * (self.budget - floor), sinks, window)
            counts = np.bincount([s for s, _ in top], minlength=S)
            kept = set().union(*(self.best(self.candidates([s]), counts[s] + floor, sinks, window) for s in range(S)))
        else:
            members = {"global": S, "layer": H, "head": 1}[scope]
            groups = [range(first, first + members) for first in range(0, S, members)]
            kept = set().union(*(self.best(self.candidates(group), members * self.budget, sinks, window, lowest) for group in groups))
        for s in range(S):
            self.pool[s] = [entry for entry in self.pool[s] + self.buffer[s] if (s, entry[0]) in kept]
            self.buffer[s] = []


def assert_equal(cache, lists):
    """The pool holds exactly what the lists do, each entry with its own key, value and stat, in time order."""
    for row, expected in enumerate(lists):
        starts = np.asarray(cache.starts[row])
        np.testing.assert_array_equal(np.diff(starts), [len(stream) for stream in expected.pool])
        for s, stream in enumerate(expected.pool):
            mine = slice(starts[s], starts[s + 1])
            np.testing.assert_array_equal(cache.position[row, mine], [position for position, _ in stream])
            np.testing.assert_array_equal(cache.stat[row, mine], [stat for _, stat in stream])
            keys = np.array([(s // H, s % H, position, row, stat) for position, stat in stream], np.float32).reshape(-1, D)
            np.testing.assert_array_equal(cache.keys[row, mine], keys)
            np.testing.assert_array_equal(cache.values[row, mine], -keys)
            assert (np.diff(cache.position[row, mine]) > 0).all()
        assert cache.seen[row] == expected.seen and cache.buffered[row] == 0
        held = [stream for layer in cache_lib.kept_positions(cache, row) for stream in layer]
        assert [stream.tolist() for stream in held] == [[position for position, _ in stream] for stream in expected.pool]


def fill(seed, levels, budgets, rounds, scope, check, **options):
    """Runs appends and selections on the cache and on lists; rounds[i] is (valid, valid), two appends for each sequence before a selection."""
    random = np.random.default_rng(seed)
    cache = cache_lib.init(L, H, D, budgets, C, W)
    lists = [Lists(budget) for budget in budgets]
    for appends in rounds:
        for valid in appends:
            stat = random.integers(-levels, 1, (L, B, T, H)).astype(np.float32)
            for row in range(B):
                lists[row].append(stat[:, row, : valid[row]])
            cache = append(cache, *entries(np.asarray(cache.seen), stat, np.array(valid)), np.array(valid, np.int32))
        cache = select(poison(cache), scope, **options)
        for expected in lists:
            expected.select(scope, **options)
        check(cache, lists)


valid = st.lists(st.integers(0, T), min_size=B, max_size=B)
rounds = st.lists(st.tuples(valid, valid), min_size=1, max_size=4)
# Two levels make most scores tie, a thousand few of them.
levels = st.sampled_from([1, 4, 1000])


@pytest.mark.parametrize("sinks, window", [(0, 0), (1, 2)])
@pytest.mark.parametrize("scope", cache_lib.SCOPES)
def test_select_keeps_what_a_sort_does(scope, sinks, window):
    @quick
    @given(st.integers(0, 2**31), levels, st.lists(st.integers(max(1, sinks + window), MOST), min_size=B, max_size=B), rounds)
    @example(0, 1000, [MOST, MOST], [([6, 6], [6, 6])] * 3)
    def check(seed, levels, budgets, rounds):
        def right(cache, lists):
            assert_equal(cache, lists)
            for row, (budget, expected) in enumerate(zip(budgets, lists, strict=True)):
                lengths = np.diff(cache.starts[row])
                # Never fewer than the budget allows, never more.
                assert lengths.sum() == cache_lib.kept_entries(cache)[row] == S * min(budget, expected.seen)
                if scope == "layer":
                    assert (lengths.reshape(L, H).sum(axis=1) == H * min(budget, expected.seen)).all()
                if scope in ("head", "shared"):
                    assert (lengths == min(budget, expected.seen)).all()
                held = [stream.tolist() for layer in cache_lib.kept_positions(cache, row) for stream in layer]
                if scope == "shared":
                    assert all(stream == held[0] for stream in held)
                protected = [p for p in range(expected.seen) if p < sinks or p >= expected.seen - window]
                assert all(set(protected) <= set(stream) for stream in held)

        fill(seed, levels, budgets, rounds, scope, right, sinks=sinks, window=window)

    check()


@pytest.mark.parametrize("sinks, window", [(0, 0), (1, 2)])
@pytest.mark.parametrize("scope", cache_lib.SCOPES)
def test_what_scores_too_low_goes_even_where_there_is_room(scope, sinks, window):
    left = []

    def right(cache, lists):
        assert_equal(cache, lists)
        left.extend((int(n), S * min(int(budget), expected.seen)) for n, budget, expected in zip(cache.starts[:, -1], cache.budget, lists, strict=True))

    # Scores of -4 occur, and stay; means of six scores may be rounded, so none may be the bound itself.
    lowest = -4.01 if scope == "shared" else -4.0
    for seed, levels in ((0, 1), (1, 4), (2, 1000)):
        fill(seed, levels, [MOST, 3], [([6, 2], [6, 0])] * 4, scope, right, sinks=sinks, window=window, lowest=lowest)
    assert any(kept < most for kept, most in left) and any(kept == most for kept, most in left)
    assert sinks or any(kept == 0 for kept, _ in left)


def test_a_global_budget_is_shared_unevenly():
    """The test above would pass on scores that give each stream the same; here one stream takes all, and the next another."""
    cache = cache_lib.init(L, H, D, [4, 4], C, W)
    for favourite in (1, 5):
        stat = np.full((L, B, T, H), -1000, np.float32)
        stat[favourite // H, :, :, favourite % H] = -1
        for _ in range(2):
            cache = append(cache, *entries(np.asarray(cache.seen), stat, np.array([T, T])), np.array([T, T], np.int32))
        cache = select(poison(cache), "global")
        assert (np.diff(cache.starts[0])[favourite] >= 2 * T).all()
        assert (cache.starts[:, -1] == 4 * S).all()


@quick
@given(st.integers(0, 2**31), st.lists(st.integers(3, MOST), min_size=B, max_size=B), st.integers(1, 3))
def test_floor(seed, budgets, count):
    """With scores that do not tie and streams that do not run short: METHOD section 4's rule. Always: the total, and each stream's floor."""
    floor, random = 2, np.random.default_rng(seed)
    # Some streams score so low that without a floor they would keep nothing.
    scale = np.where(random.random((L, 1, 1, H)) < 0.5, 1.0, 1000.0)
    cache, lists = cache_lib.init(L, H, D, budgets, S * MOST, W), [Lists(budget) for budget in budgets]
    for _ in range(count):
        for _ in range(2):
            stat = (-scale * (1 + random.random((L, B, T, H)))).astype(np.float32)
            for row in range(B):
                lists[row].append(stat[:, row])
            cache = append(cache, *entries(np.asarray(cache.seen), stat, np.full(B, T)), np.full(B, T, np.int32))
        before = [[len(expected.pool[s]) + len(expected.buffer[s]) for s in range(S)] for expected in lists]
        after = []
        cache = select(poison(cache), "global", floor=floor)
        for row, expected in enumerate(lists):
            expected.select("global", floor=floor)
            lengths = np.diff(cache.starts[row])
            assert lengths.sum() == S * budgets[row]
            assert (lengths >= floor).all()
            after.append([len(stream) for stream in expected.pool])
        if np.any(np.equal(before, after)):
            return
        assert_equal(cache, lists)


def test_a_stream_that_runs_short_leaves_its_share_to_the_others():
    """METHOD's rule would lose the places that stream 0 cannot fill: it has 4 + 6 entries, all of the best, and a right to 12 + 2."""
    cache = cache_lib.init(L, H, D, [4, 4], S * MOST, W)
    stat = np.full((L, B, T, H), -100, np.float32)
    stat[0, :, :, 0] = -1
    cache = append(cache, *entries(np.zeros(B, int), stat, np.full(B, T)), np.full(B, T, np.int32))
    cache = select(poison(cache), "global", floor=2)
    assert (cache.starts[:, -1] == 4 * S).all()
    lengths = np.diff(cache.starts)
    assert (lengths[:, 0] == T).all() and (lengths >= 2).all()


@pytest.mark.parametrize("sinks, window, floor, budget", [(1, 1, 2, 4), (2, 0, 3, 5)])
def test_floor_and_protection_together(sinks, window, floor, budget):
    """Both hold, up to a budget that they fill exactly; a smaller one is refused (test_generation)."""

    def right(cache, lists):
        for row in range(B):
            held = cache_lib.kept_positions(cache, row)
            seen = int(cache.seen[row])
            protected = {p for p in range(seen) if p < sinks or p >= seen - window}
            for stream in (stream for layer in held for stream in layer):
                assert protected <= set(stream.tolist())
                assert len(stream) >= min(floor, seen)
            assert cache.starts[row, -1] == S * min(budget, seen)

    fill(0, 1000, [budget, budget], [([6, 2], [6, 0])] * 4, "global", right, sinks=sinks, window=window, floor=floor)


@pytest.mark.parametrize("scope", cache_lib.SCOPES)
def test_a_row_does_not_depend_on_its_neighbours(scope):
    """The same sequence in row 0, beside another of another length and budget: the pool's rows are equal bit by bit."""
    found = []
    for other_budget, other_valid in ((1, 0), (5, 6)):
        pools = []
        fill(
            7,
            1000,
            [3, other_budget],
            [([6, other_valid], [4, other_valid])] * 3,
            scope,
            lambda cache, lists, pools=pools: pools.append([np.asarray(leaf[0]) for leaf in (cache.position, cache.starts, cache.stat)]),
        )
        found.append(pools)
    for one, other in zip(*found, strict=True):
        live = one[1][-1]
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a[:live], b[:live])


@pytest.mark.parametrize("width", [8, 20])
def test_with_buffer_keeps_what_it_holds(width):
    valid = np.array([T, 3])
    stat = np.random.default_rng(0).integers(-9, 0, (L, B, T, H)).astype(np.float32)
    cache = append(cache_lib.init(L, H, D, [2, 3], C, W), *entries(np.zeros(B, int), stat, valid), valid.astype(np.int32))
    other = cache_lib.with_buffer(cache, width)
    assert other.buffer_keys.shape == other.buffer_values.shape == (L, B, H, width, D)
    assert other.buffer_stat.shape == (L, B, H, width) and other.buffer_position.shape == (B, width)
    for row in range(B):
        n = valid[row]
        for name in ("buffer_keys", "buffer_values", "buffer_stat"):
            np.testing.assert_array_equal(getattr(other, name)[:, row, :, :n], getattr(cache, name)[:, row, :, :n])
        np.testing.assert_array_equal(other.buffer_position[row, :n], np.arange(n))
    for one, wider in zip(*(cache_lib.kept_positions(c, 0) for c in (select(poison(cache), "global"), select(poison(other), "global"))), strict=True):
        assert [stream.tolist() for stream in one] == [stream.tolist() for stream in wider]


@pytest.mark.parametrize(("scope", "options"), [*((scope, {}) for scope in cache_lib.SCOPES), ("global", {"lowest": -9.0}), ("global", {"floor": 1})])
def test_who_is_not_due_keeps_pool_and_buffer(scope, options):
    random = np.random.default_rng(0)
    cache = cache_lib.init(L, H, D, [2, 3], C, W)
    for valid in ([T, T], [5, 4]):
        stat = random.integers(-9, 0, (L, B, T, H)).astype(np.float32)
        cache = append(select(cache, scope), *entries(np.asarray(cache.seen), stat, np.array(valid)), np.array(valid, np.int32))
    before, due = poison(cache), np.array([True, False])
    everyone, found = (poison(select(before, scope, **options, due=one)) for one in (None, due))
    assert found.buffered.tolist() == [0, 4] and np.array_equal(found.starts[1], before.starts[1]) and found.starts[1, -1] > 0
    for row, expected in enumerate((everyone, before)):
        for name in cache_lib.Cache._fields[:-1]:
            at = (slice(None), row) if getattr(found, name).shape[0] == L and name.startswith("buffer_") and name != "buffer_position" else row
            np.testing.assert_array_equal(getattr(found, name)[at], getattr(expected, name)[at], err_msg=f"{name} of {row}")


def test_a_fresh_cache_holds_nothing():
    cache = cache_lib.init(L, H, D, [2, 3], C, W)
    assert cache_lib.kept_entries(cache).tolist() == [0, 0]
    for scope in cache_lib.SCOPES:
        assert cache_lib.kept_entries(select(poison(cache), scope)).tolist() == [0, 0]
    assert cache_lib.allocated_bytes(cache) == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert cache_lib.init(L, H, D, [0], 0, W).keys.shape == (1, 0, D)


@pytest.mark.parametrize("budget", [12, None])
def test_dead_slots_never_reach_the_model(small, budget):
    """NaN in all dead slots, between appends and before decoding, changes not one bit of the answer."""

    def run(spoil):
        rows, logits = Rows(small, 2, budget, "retention", "global", 16, None, None), []
        random = np.random.default_rng(0)
        for lengths in ((50, 9), (5, 0), (1, 33)):
            rows.append([random.integers(0, 61, length).tolist() for length in lengths])
            rows.cache = spoil(rows.cache)
            logits.append(rows.logits)
        tokens = []
        for piece in rows.decode(40, 0.0, 1.0, 0, stop=()):
            rows.cache = spoil(rows.cache)
            tokens.append(piece)
        return [*logits, rows.logits], np.concatenate(tokens, axis=1)

    (clean, clean_tokens), (spoilt, spoilt_tokens) = run(lambda cache: cache), run(poison)
    for a, b in zip(clean, spoilt, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(clean_tokens, spoilt_tokens)


def test_streams_have_their_own_values():
    valid, stat = np.full(B, T, np.int32), -1.0 - np.random.default_rng(0).integers(0, 9, (L, B, T, H)).astype(np.float32)
    cache = select(append(cache_lib.init(L, H, D, [4, 4], C, W), *entries(np.zeros(B, int), stat, valid), valid), "global")
    cache = append(cache, *entries(np.full(B, T), stat, valid), valid)
    streams = cache_lib.streams_of(cache, 1, C)
    assert np.any(streams.keys) and streams.live.sum() == (cache.starts[:, 6] - cache.starts[:, 3]).sum() + B * H * T, "of the pool and the buffer"
    np.testing.assert_array_equal(streams.values, -streams.keys)
