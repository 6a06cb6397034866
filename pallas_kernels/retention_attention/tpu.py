"""The TPU kernels (Mosaic): flash attention forward, and its backward pass as a kernel for dk, dv, dlog_beta and one for dq.

A tile is a block of queries, with all G query heads of one kv head, against a block of keys: bias and retained mass depend on the kv head alone and
are computed once for the G of them. A schedule made by XLA lists the tiles that hold anything visible, so that neither the future nor other documents
cost a step of the grid; a tile that is visible in full needs no mask.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.retention_attention.common import HIDDEN, LOG2E, biased, differentiable, document_bounds, grow, of_queries, product

LANES = 128
# A step of the schedule is one word: the block whose result it adds to, the block it meets, and these.
FIRST, LAST, LIVE, MASKED = 1, 2, 4, 8
OWN, OTHER = 17, 4


def blocks(length: int, group: int, dim: int, dtype) -> tuple[int, int, int]:
    """(T padded, queries of a block, keys of a block): powers of two that divide T, keys no fewer than queries."""
    width = dim * jnp.dtype(dtype).itemsize
    # Long tiles keep the units busier, short ones waste less on the diagonal; either way a tile and what goes with it fill at most some 10 MiB.
    rows, most = 512 if width > 512 else 1024, 1024 if length >= 16_384 and width <= 256 else 512
    enough = pl.next_power_of_2(max(length, LANES))
    keys = min(most, enough)
    queries = min(keys, 512, max(LANES, pl.next_power_of_2(rows // group + 1) // 2))
    return pl.cdiv(length, keys) * keys, queries, keys


def own(word):
    return word >> OWN


def other(word):
    return word >> OTHER & (1 << OWN - OTHER) - 1


def schedule(low: jax.Array, high: jax.Array, full_low: jax.Array, full_high: jax.Array, most: int) -> tuple[jax.Array, jax.Array, int]:
    """The steps of all blocks, one behind the other: block i meets blocks low[i]..high[i], of which full_low[i]..full_high[i] need no mask.

    All [B,n] int32, ends included. Returns words [B*most], how many steps the longest sequence takes, and `most`. A shorter one then stays where it
    is, not LIVE. A block that meets none takes one step that is not LIVE either, for its zeros to be written.

    Raises ValueError for more words than the scalar memory of a TPU holds.
    """
    if 4 * low.shape[0] * most > 2**20:
        rows = f"{low.shape[0]} rows a device, of which each takes {most} blocks of queries and keys"
        raise ValueError(f"{rows}, have a schedule of more than the 1 MiB that a TPU kernel can be told; split rows or tokens over more devices")
    some = low <= high
    low, high = jnp.where(some, low, 0), jnp.where(some, high, 0)
    end = jnp.cumsum(high - low + 1, axis=1)
    step = jnp.arange(most)
    block = jax.vmap(lambda end: jnp.searchsorted(end, step, side="right"))(end)
    block = jnp.minimum(block, low.shape[1] - 1)
    some, low, high, full_low, full_high, block_end = (jnp.take_along_axis(x, block, axis=1) for x in (some, low, high, full_low, full_high, end))
    met = jnp.minimum(high - block_end + 1 + step, high)
    flags = FIRST * (met == low) + LAST * (met == high) + LIVE * some + MASKED * ((met < full_low) | (met > full_high))
    words = block << OWN | met << OTHER | jnp.where(step < end[:, -1:], flags, 0)
    return words.reshape(-1), jnp.max(end[:, -1]), most


def queries_schedule(first, length, queries, keys, start=None):
    """Of blocks of queries, from their first [B,Tq]: of `length` keys those from the first query's document on up to the last query."""
    begin = jnp.arange(0, first.shape[1], queries)
    time = begin + (0 if start is None else start)
    low, high = first[:, begin] // keys, jnp.minimum((time + queries - 1) // keys, length // keys - 1)
    full_low, full_high = pl.cdiv(first[:, begin + queries - 1], keys), (time + 1) // keys - 1
    high, full_high = (jnp.broadcast_to(x, low.shape) for x in (high, full_high))
    most = sum(length // keys if start is not None else (i + queries - 1) // keys + 1 for i in range(0, first.shape[1], queries))
    return schedule(low, high, full_low, full_high, most)


def keys_schedule(last, length, queries, keys, start=None):
    """Of blocks of keys, from their last [B,T]: of `length` queries those from the first key on up to the end of the last key's document."""
    begin = jnp.arange(0, last.shape[1], keys)
    last_first, last_last = last[:, begin], last[:, begin + keys - 1]
    most = sum((length if start is not None else length - i) // queries for i in range(0, last.shape[1], keys))
    if start is not None:
        begin, last_first, last_last = (x - start for x in (begin, last_first, last_last))
    low, high = jnp.maximum(begin // queries, 0), jnp.minimum(last_last // queries, length // queries - 1)
    full_low, full_high = pl.cdiv(begin + keys - 1, queries), (last_first + 1) // queries - 1
    low, full_low = (jnp.broadcast_to(x, high.shape) for x in (low, full_low))
    return schedule(low, high, full_low, full_high, most)


def wide(x, n):
    """(rows, LANES), all lanes equal, -> (rows, n)"""
    return jnp.concatenate([x] * pl.cdiv(n, LANES), axis=1)[:, :n]


def by_lane(x):
    """The sum over the last axis, but for the last step: (rows, n) -> (rows, LANES)"""
    return sum(x[:, i : i + LANES] for i in range(0, x.shape[1], LANES))


def column(row):
    """(1, n) -> (n, LANES), all lanes equal"""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


def bias_and_distance(shape, queries_axis, queries, keys, log_beta, first, last, masked):
    """The bias of a tile's entries, HIDDEN where masked and not visible (None if it is 0), and how far keys lie behind.

    queries, keys: where the tile begins. log_beta, and first of the queries or last of the keys, broadcast to `shape`.
    """
    token, index = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (queries_axis, 1 - queries_axis))
    distance = queries - keys + token - index
    bias = None if log_beta is None else distance.astype(jnp.float32) * log_beta
    if masked:
        same = index >= first - keys if last is None else token <= last - queries
        bias = jnp.where((distance >= 0) & same, 0.0 if bias is None else bias, HIDDEN)
    return bias, distance


def masked_or_not(word, tile):
    """Runs tile(masked) for a step's tile, as its word says."""
    pl.when((word & LIVE != 0) & (word & MASKED != 0))(functools.partial(tile, True))
    pl.when((word & LIVE != 0) & (word & MASKED == 0))(functools.partial(tile, False))


def forward_kernel(words, start, q, k, v, log_beta, last, out, lse, mass, sums, largest, total, retained, *, most):
    word = words[pl.program_id(0) * most + pl.program_id(2)]
    group, queries, dim = q.shape
    keys = k.shape[0]

    @pl.when(word & FIRST != 0)
    def _():
        sums[...] = jnp.zeros_like(sums)
        largest[...] = jnp.full_like(largest, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        retained[...] = jnp.zeros_like(retained)

    def tile(masked):
        beta = None if log_beta is None else log_beta[...]
        bias, _ = bias_and_distance((queries, keys), 0, start[0] + own(word) * queries, other(word) * keys, beta, None, last[...], masked)
        if log_beta is not None:
            retained[...] += by_lane(jnp.exp2(bias))
        for g in range(group):
            at = slice(g * queries, (g + 1) * queries)
            logits = biased(product(q[g], k[...], (1, 1)) * (dim**-0.5 * LOG2E), bias)
            new_largest = jnp.maximum(largest[at], jnp.max(logits, axis=1, keepdims=True))
            weights, decay = jnp.exp2(logits - wide(new_largest, keys)), jnp.exp2(largest[at] - new_largest)
            total[at] = total[at] * decay + by_lane(weights)
            sums[at] = sums[at] * wide(decay, dim) + product(weights.astype(v.dtype), v[...], (1, 0))
            largest[at] = new_largest

    masked_or_not(word, tile)

    @pl.when(word & LAST != 0)
    def _():
        for g in range(group):
            at = slice(g * queries, (g + 1) * queries)
            all_lanes = jnp.sum(total[at], axis=1, keepdims=True)
            out[g] = (sums[at] / all_lanes).astype(out.dtype)
            lse[g : g + 1] = jnp.transpose((largest[at] + jnp.log2(all_lanes)) / LOG2E)[:1]
        if mass is not None:
            mass[...] = jnp.sum(jnp.transpose(retained[...]), axis=0, keepdims=True)


def keys_kernel(
    words, start, q, k, v, log_beta, first, lse, delta, dout, dmass, dk, dv, dlog_beta, sums_k, sums_v, sums_beta, beta_column, *, most
):
    """Tiles lie transposed here, [keys, queries], so that what each query brings lies along lanes."""
    word = words[pl.program_id(0) * most + pl.program_id(2)]
    group, queries, dim = q.shape
    keys = k.shape[0]

    @pl.when(word & FIRST != 0)
    def _():
        sums_k[...] = jnp.zeros_like(sums_k)
        sums_v[...] = jnp.zeros_like(sums_v)
        sums_beta[...] = jnp.zeros_like(sums_beta)
        if log_beta is not None:
            beta_column[...] = column(log_beta[...])

    def tile(masked):
        beta = None if log_beta is None else wide(beta_column[...], queries)
        bias, distance = bias_and_distance((keys, queries), 1, start[0] + other(word) * queries, own(word) * keys, beta, first[...], None, masked)
        dbias = 0.0 if log_beta is None else dmass[...] * jnp.exp2(bias)
        for g in range(group):
            logits = biased(product(k[...], q[g], (1, 1)) * (dim**-0.5 * LOG2E), bias)
            weights = jnp.exp2(logits - lse[g : g + 1] * LOG2E)
            sums_v[...] += product(weights.astype(dout.dtype), dout[g], (1, 0))
            dlogits = weights * (product(v[...], dout[g], (1, 1)) - delta[g : g + 1])
            sums_k[...] += product(dlogits.astype(q.dtype), q[g], (1, 0))
            dbias += dlogits
        if log_beta is not None:
            sums_beta[...] += by_lane(dbias * distance.astype(jnp.float32))

    masked_or_not(word, tile)

    @pl.when(word & LAST != 0)
    def _():
        dk[...] = (sums_k[...] * dim**-0.5).astype(dk.dtype)
        dv[...] = sums_v[...].astype(dv.dtype)
        if log_beta is not None:
            dlog_beta[...] = jnp.sum(jnp.transpose(sums_beta[...]), axis=0, keepdims=True)


def queries_kernel(words, start, q, k, v, log_beta, last, lse, delta, dout, dq, sums, lse_column, delta_column, *, most):
    word = words[pl.program_id(0) * most + pl.program_id(2)]
    group, queries, dim = q.shape
    keys = k.shape[0]

    @pl.when(word & FIRST != 0)
    def _():
        sums[...] = jnp.zeros_like(sums)
        for g in range(group):
            at = slice(g * queries, (g + 1) * queries)
            lse_column[at] = column(lse[g : g + 1] * LOG2E)
            delta_column[at] = column(delta[g : g + 1])

    def tile(masked):
        beta = None if log_beta is None else log_beta[...]
        bias, _ = bias_and_distance((queries, keys), 0, start[0] + own(word) * queries, other(word) * keys, beta, None, last[...], masked)
        for g in range(group):
            at = slice(g * queries, (g + 1) * queries)
            logits = biased(product(q[g], k[...], (1, 1)) * (dim**-0.5 * LOG2E), bias)
            weights = jnp.exp2(logits - wide(lse_column[at], keys))
            dlogits = weights * (product(dout[g], v[...], (1, 1)) - wide(delta_column[at], keys))
            sums[at] += product(dlogits.astype(k.dtype), k[...], (1, 0))

    masked_or_not(word, tile)

    @pl.when(word & LAST != 0)
    def _():
        dq[...] = (sums[...] * dim**-0.5).reshape(dq.shape).astype(dq.dtype)


def specs(most: int, own_queries: bool, group: int, queries: int, keys: int, dim: int) -> dict:
    """Where a step's blocks lie, by kind of array; own_queries: whether it is queries that the schedule's steps add to."""

    def spec(of_queries, block, place):
        def index(b, h, step, words, start):
            word = words[b * most + step]
            return place(b, h, own(word) if of_queries == own_queries else other(word))

        return pl.BlockSpec(block, index)

    return {
        "q": spec(True, (None, None, group, queries, dim), lambda b, h, i: (b, h, 0, i, 0)),  # [B, H, G, Tq, D]
        "k": spec(False, (None, None, keys, dim), lambda b, h, i: (b, h, i, 0)),  # [B, H, T, D]
        "lse": spec(True, (None, None, group, queries), lambda b, h, i: (b, h, 0, i)),  # [B, H, G, Tq]
        "mass": spec(True, (None, None, 1, queries), lambda b, h, i: (b, h, 0, i)),  # [B, H, 1, Tq]
        "beta": spec(False, (None, None, 1, keys), lambda b, h, i: (b, h, 0, i)),  # [B, H, 1, T]
        "first": spec(True, (None, 1, queries), lambda b, h, i: (b, 0, i)),  # [B, 1, Tq]
        "last": spec(False, (None, 1, keys), lambda b, h, i: (b, 0, i)),  # [B, 1, T]
    }


def call(kernel, own_queries, plan, start, sizes, inputs, outputs, scratch, products, interpret):
    """Runs kernel over batch, kv heads and the steps of `plan`.

    sizes: queries and keys of a block. inputs, outputs: (kind, array or its shape) each, None for what there is not. products: matrix products a tile.
    """
    words, steps, most = plan
    batch, heads, group, length, dim = inputs[0][1].shape
    pairs = length * inputs[1][1].shape[2]
    kinds = {None: None, **specs(most, own_queries, group, *sizes, dim)}
    return pl.pallas_call(
        functools.partial(kernel, most=most),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, steps),
            in_specs=[kinds[x and x[0]] for x in inputs],
            out_specs=[kinds[x and x[0]] for x in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[None if x is None else jax.ShapeDtypeStruct(x[1].shape, x[1].dtype) for x in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=products * batch * heads * group * pairs * dim,
            transcendentals=batch * heads * (group + 1) * pairs // 2,
            bytes_accessed=sum(x[1].size * x[1].dtype.itemsize for x in [*inputs, *outputs] if x is not None),
        ),
        interpret=interpret,
        name=kernel.__name__,
    )(words, jnp.asarray([0 if start is None else start], jnp.int32), *[None if x is None else x[1] for x in inputs])


def time_inside(x, padded):
    """[B,T,H,G,D] or [B,T,H,D] -> [B,H,G,T,D] or [B,H,T,D], T padded."""
    return jnp.moveaxis(grow(x, 1, padded), 1, -2)


def time_outside(x, length):
    return jnp.moveaxis(x[..., :length, :], -2, 1)


def number(kind, x, padded):
    """(kind, [B,T,H] as [B,H,1,T]), T padded."""
    return None if x is None else (kind, jnp.swapaxes(grow(x, 1, padded), 1, 2)[:, :, None])


def per_token(x, length):
    return None if x is None else jnp.swapaxes(x[:, :, 0, :length], 1, 2)


def forward(q, k, v, log_beta, segment_ids, start, interpret=False):
    batch, length, heads, group, dim = q.shape
    padded, queries, keys = blocks(k.shape[1], group, dim, q.dtype)
    padded_queries = pl.cdiv(length, queries) * queries
    first, last = document_bounds(segment_ids, batch, k.shape[1], padded)
    q, k, v = time_inside(q, padded_queries), time_inside(k, padded), time_inside(v, padded)
    beta = None if log_beta is None else number("beta", log_beta * LOG2E, padded)
    mass = None if log_beta is None else ("mass", jax.ShapeDtypeStruct((batch, heads, 1, padded_queries), jnp.float32))
    inputs = [("q", q), ("k", k), ("k", v), beta, ("last", last[:, None])]
    outputs = [("q", q), ("lse", jax.ShapeDtypeStruct((batch, heads, group, padded_queries), jnp.float32)), mass]
    rows = (group * queries, LANES)
    scratch = [(group * queries, dim), rows, rows, (queries, LANES)]
    plan = queries_schedule(of_queries(first, start, padded_queries), padded, queries, keys, start)
    out, lse, mass = call(forward_kernel, True, plan, start, (queries, keys), inputs, outputs, scratch, 2, interpret)
    return time_outside(out, length), per_token(mass, length), lse[..., :length]


def backward(q, k, v, log_beta, segment_ids, start, lse, delta, dout, dmass, interpret=False):
    batch, length, _, group, dim = q.shape
    whole = k.shape[1]
    padded, queries, keys = blocks(whole, group, dim, q.dtype)
    padded_queries = pl.cdiv(length, queries) * queries
    first, last = document_bounds(segment_ids, batch, whole, padded)
    first = of_queries(first, start, padded_queries)
    q, dout = (("q", time_inside(x, padded_queries)) for x in (q, dout))
    k, v = (("k", time_inside(x, padded)) for x in (k, v))
    lse, delta = (("lse", grow(x, 3, padded_queries)) for x in (lse, delta))
    beta = None if log_beta is None else number("beta", log_beta * LOG2E, padded)
    rows = (group * queries, LANES)

    inputs = [q, k, v, beta, ("last", last[:, None]), lse, delta, dout]
    scratch = [(group * queries, dim), rows, rows]
    plan = queries_schedule(first, padded, queries, keys, start)
    [dq] = call(queries_kernel, True, plan, start, (queries, keys), inputs, [q], scratch, 3, interpret)

    inputs = [q, k, v, beta, ("first", first[:, None]), lse, delta, dout, number("mass", dmass, padded_queries)]
    scratch = [(keys, dim), (keys, dim), (keys, LANES), (keys, LANES)]
    plan = keys_schedule(last, padded_queries, queries, keys, start)
    dk, dv, dlog_beta = call(keys_kernel, False, plan, start, (queries, keys), inputs, [k, v, beta], scratch, 4, interpret)
    return time_outside(dq, length), time_outside(dk, whole), time_outside(dv, whole), per_token(dlog_beta, whole)


def retention_attention(q, k, v, log_beta=None, segment_ids=None, start=None, interpret=False):
    """As the operation of this name. interpret: what pallas_call takes."""
    passes = (functools.partial(f, interpret=interpret) for f in (forward, backward))
    return differentiable(*passes)(q, k, v, log_beta, segment_ids, start)
