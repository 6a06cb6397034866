"""The GPU kernels (Pallas in its Triton lowering): FlashAttention-2 forward, and its backward pass as a kernel for dk, dv, dlog_beta and one for dq.

A program of the forward and the dq kernel has a block of queries with all G query heads of one kv head as rows, (time, g) in memory's order, and
goes through the keys; one of the other kernel has a block of keys and goes through the queries. Either loop has two parts: the tiles that are visible
in full, and those that need a mask. The retained mass is a small tile of its own beside each tile, so that it costs 1/G of the exponentials.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.retention_attention.common import HIDDEN, LOG2E, biased, differentiable, document_bounds, grow, of_queries, product

PADDING = 128  # T is padded to a multiple of it, and so of every block of keys


class Tiles(NamedTuple):
    rows: int  # queries
    keys: int
    warps: int
    stages: int  # of the pipeline of loads


def tiles(group: int, dim: int, dtype) -> dict[str, Tiles]:
    """By kernel."""
    if dtype == jnp.float32:  # no tensor cores at full precision
        tile = Tiles(64 if dim <= 64 else 32, 32 if dim <= 128 else 16, 8, 2)
        found = {"forward": tile, "keys": tile, "queries": tile}
    elif dim > 128:
        found = {"forward": Tiles(128, 32, 8, 2), "keys": Tiles(32, 64, 8, 2), "queries": Tiles(64, 32, 8, 2)}
    else:
        found = {"forward": Tiles(128, 128, 8, 2), "keys": Tiles(64, 128, 8, 2), "queries": Tiles(128, 64, 8, 2)}
    return {name: tile._replace(rows=max(tile.rows, pl.next_power_of_2(group))) for name, tile in found.items()}


class Rows(NamedTuple):
    """Rows of a tile that stand for queries (or tokens), from token `begin` on."""

    begin: jax.Array
    token: jax.Array  # [rows] tokens after `begin`
    head: jax.Array | None  # [rows] which of the G query heads
    start: jax.Array  # where they begin in an array of one number for each
    valid: jax.Array | None  # [rows] which rows count; None if all do


def query_rows(block, rows: int, group: int, length: int) -> Rows:
    """The queries of block's rows // group tokens."""
    tokens = rows // group
    row = jnp.arange(rows)
    token, begin = jax.lax.div(row, group), block * tokens
    whole = tokens * group == rows and length % tokens == 0
    return Rows(begin, token, jax.lax.rem(row, group), begin * group, None if whole else (token < tokens) & (begin + token < length))


def token_rows(block, rows: int, group: int, length: int) -> Rows:
    """The same tokens once each, as the retained mass has them, and as many more rows as make a power of two."""
    tokens = rows // group
    token, begin = jnp.arange(pl.next_power_of_2(tokens)), block * tokens
    return Rows(begin, token, None, begin, (token < tokens) & (begin + token < length))


def place(ref, rows: Rows):
    """Where the rows lie in ref [T,G,D], as [rows, D], or in an array of one number for each."""
    if len(ref.shape) == 1:
        return ref.at[pl.ds(rows.start, rows.token.shape[0])]
    return ref.at[(rows.begin + rows.token)[:, None], rows.head[:, None], jnp.arange(ref.shape[2])[None]]


def mask(at, rows: Rows):
    return rows.valid if rows.valid is None or len(at.shape) == 1 else jnp.broadcast_to(rows.valid[:, None], at.shape)


def load(ref, rows: Rows):
    """The rows of ref, zeros where they do not count."""
    at = place(ref, rows)
    return plgpu.load(at, mask=mask(at, rows), other=None if rows.valid is None else 0.0)


def store(ref, rows: Rows, value):
    at = place(ref, rows)
    plgpu.store(at, value.astype(ref.dtype), mask=mask(at, rows))


def bias_and_distance(queries, token, keys, index, beta, first, last, masked):
    """The bias of keys `keys` + index for queries at `queries` + token, HIDDEN where masked and not visible, None if it is 0.

    And how far they lie behind.

    token and index are [rows, 1] and [keys] or [rows] and [keys, 1]; first is the queries', last the keys', None where no document ends.
    """
    # One conversion of a scalar: converting each tile's indices would take longer than all the rest.
    distance = (queries - keys).astype(jnp.float32) + token.astype(jnp.float32) - index.astype(jnp.float32)
    bias = None if beta is None else distance * beta
    if masked:
        visible = distance >= 0
        visible = visible if first is None else visible & (index >= first - keys)
        visible = visible if last is None else visible & (token <= last - queries)
        bias = jnp.where(visible, 0.0 if bias is None else bias, HIDDEN)
    return bias, distance


def two_loops(low, full_low, full_high, high, tile, state):
    """Runs tile(masked, i, state) for i of low..high, without a mask in full_low..full_high; ends are not included."""
    full_low = jnp.minimum(full_low, high)
    full_high = jnp.maximum(full_high, full_low)
    state = jax.lax.fori_loop(full_low, full_high, functools.partial(tile, False), state)
    before = full_low - low

    def masked(i, state):
        return tile(True, low + i + jnp.where(i < before, 0, full_high - full_low), state)

    return jax.lax.fori_loop(0, before + high - full_high, masked, state)


def keys_seen(begin, end, first, keys: int, length: int, start=0):
    """Which blocks of `length` keys the queries begin..end see, as two_loops takes them. first is the queries'."""
    low, full_low = (0, 0) if first is None else (first[begin] // keys, pl.cdiv(first[end - 1], keys))
    # Padding of the queries may stand behind the last key.
    return low, full_low, jnp.minimum(start + begin + 1, length) // keys, pl.cdiv(jnp.minimum(start + end, length), keys)


def queries_seeing(begin, keys: int, last, length: int, tokens: int, start=0):
    """Which blocks of `length` queries see the keys begin..begin + keys, as two_loops takes them. last is the keys'."""
    end, full_end = (length, length) if last is None else (last[begin + keys - 1] + 1 - start, last[begin] + 1 - start)
    # The keys, or their documents' ends, may lie before the first query or behind the last one.
    begin, full_begin, end, full_end = (jnp.clip(x, 0, length) for x in (begin - start, begin - start + keys - 1, end, full_end))
    high = pl.cdiv(end, tokens)
    return jnp.where(begin < end, begin // tokens, high), pl.cdiv(full_begin, tokens), full_end // tokens, high


def forward_kernel(q, k, v, log_beta, start, first, out, lse, mass, *, rows, keys, scale):
    length, group, dim = q.shape
    start = 0 if start is None else start[0]
    block = pl.num_programs(0) - 1 - pl.program_id(0)  # the longest first
    own, own_tokens = query_rows(block, rows, group, length), token_rows(block, rows, group, length)
    queries, index = load(q, own), jnp.arange(keys)
    row_first, token_first = (None if first is None else first[jnp.minimum(x.begin + x.token, length - 1)][:, None] for x in (own, own_tokens))

    def tile(masked, j, state):
        largest, total, sums, retained = state
        at = pl.ds(j * keys, keys)
        beta = None if log_beta is None else log_beta[at]
        bias, _ = bias_and_distance(start + own.begin, own.token[:, None], j * keys, index, beta, row_first, None, masked)
        logits = biased(product(queries, k[at, :], (1, 1)) * (scale * LOG2E), bias)
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=1))
        weights, decay = jnp.exp2(logits - new_largest[:, None]), jnp.exp2(largest - new_largest)
        total = total * decay + jnp.sum(weights, axis=1)
        sums = sums * decay[:, None] + product(weights.astype(v.dtype), v[at, :], (1, 0))
        if log_beta is not None:
            bias, _ = bias_and_distance(start + own.begin, own_tokens.token[:, None], j * keys, index, beta, token_first, None, masked)
            retained += jnp.exp2(bias)
        return new_largest, total, sums, retained

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    retained = zeros(() if log_beta is None else (own_tokens.token.shape[0], keys))
    state = (jnp.full((rows,), -jnp.inf), zeros((rows,)), zeros((rows, dim)), retained)
    end = jnp.minimum(own.begin + rows // group, length)
    largest, total, sums, retained = two_loops(*keys_seen(own.begin, end, first, keys, k.shape[0], start), tile, state)
    store(out, own, sums / total[:, None])
    store(lse, own, (largest + jnp.log2(total)) / LOG2E)
    if log_beta is not None:
        store(mass, own_tokens, jnp.sum(retained, axis=1))


def queries_kernel(q, k, v, log_beta, start, first, lse, delta, dout, dq, *, rows, keys, scale):
    length, group, dim = q.shape
    start = 0 if start is None else start[0]
    own = query_rows(pl.num_programs(0) - 1 - pl.program_id(0), rows, group, length)
    queries, gradients, index = load(q, own), load(dout, own), jnp.arange(keys)
    row_lse, row_delta = load(lse, own)[:, None] * LOG2E, load(delta, own)[:, None]
    row_first = None if first is None else first[jnp.minimum(own.begin + own.token, length - 1)][:, None]

    def tile(masked, j, sums):
        at = pl.ds(j * keys, keys)
        logits, dweights = product(queries, k[at, :], (1, 1)), product(gradients, v[at, :], (1, 1))
        beta = None if log_beta is None else log_beta[at]
        bias, _ = bias_and_distance(start + own.begin, own.token[:, None], j * keys, index, beta, row_first, None, masked)
        dlogits = jnp.exp2(biased(logits * (scale * LOG2E), bias) - row_lse) * (dweights - row_delta)
        return sums + product(dlogits.astype(k.dtype), k[at, :], (1, 0))

    end = jnp.minimum(own.begin + rows // group, length)
    sums = two_loops(*keys_seen(own.begin, end, first, keys, k.shape[0], start), tile, jnp.zeros((rows, dim), jnp.float32))
    store(dq, own, sums * scale)


def keys_kernel(q, k, v, log_beta, start, last, lse, delta, dout, dmass, dk, dv, dlog_beta, *, rows, keys, scale):
    """Tiles lie transposed here, [keys, rows]."""
    length, group, dim = q.shape
    start = 0 if start is None else start[0]
    begin = pl.program_id(0) * keys
    at, index = pl.ds(begin, keys), jnp.arange(keys)[:, None]
    own_keys, own_values = k[at, :], v[at, :]
    beta = None if log_beta is None else log_beta[at][:, None]
    key_last = None if last is None else last[at][:, None]

    def tile(masked, i, state):
        sums_k, sums_v, sums_beta = state
        met = query_rows(i, rows, group, length)
        queries, gradients = load(q, met), load(dout, met)
        logits, dweights = product(own_keys, queries, (1, 1)), product(own_values, gradients, (1, 1))
        bias, distance = bias_and_distance(start + met.begin, met.token, begin, index, beta, None, key_last, masked)
        weights = jnp.exp2(biased(logits * (scale * LOG2E), bias) - load(lse, met) * LOG2E)
        sums_v += product(weights.astype(dout.dtype), gradients, (1, 0))
        dlogits = weights * (dweights - load(delta, met))
        sums_k += product(dlogits.astype(q.dtype), queries, (1, 0))
        if log_beta is not None:
            sums_beta += jnp.sum(dlogits * distance, axis=1)
            met_tokens = token_rows(i, rows, group, length)
            bias, distance = bias_and_distance(start + met.begin, met_tokens.token, begin, index, beta, None, key_last, masked)
            sums_beta += jnp.sum(load(dmass, met_tokens) * jnp.exp2(bias) * distance, axis=1)
        return sums_k, sums_v, sums_beta

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    state = (zeros((keys, dim)), zeros((keys, dim)), zeros((keys,)))
    sums_k, sums_v, sums_beta = two_loops(*queries_seeing(begin, keys, last, length, rows // group, start), tile, state)
    dk[at, :] = (sums_k * scale).astype(dk.dtype)
    dv[at, :] = sums_v.astype(dv.dtype)
    if log_beta is not None:
        dlog_beta[at] = sums_beta


def spec(x):
    """All the time of one sequence and kv head of an array (kind, array)."""
    if x is None:
        return None
    kind, array = x
    block, where = {
        "q": ((None, ..., None, ..., ...), lambda i, h, b: (b, 0, h, 0, 0)),  # [B, Tq, H, G, D]
        "k": ((None, ..., None, ...), lambda i, h, b: (b, 0, h, 0)),  # [B, T, H, D]
        "head": ((None, None, ...), lambda i, h, b: (b, h, 0)),  # [B, H, T], [B, H, Tq] or [B, H, Tq*G]
        "row": ((None, ...), lambda i, h, b: (b, 0)),  # [B, T] or [B, Tq]
        "start": ((...,), lambda i, h, b: (0,)),  # [1]
    }[kind]
    return pl.BlockSpec(tuple(n if whole is ... else None for whole, n in zip(block, array.shape, strict=True)), where)


def call(kernel, name, dim, inputs, outputs, interpret):
    """Runs the kernel of that name in tiles().

    dim: D before padding. inputs, outputs: (kind, array or its shape) each, None for what there is not.
    """
    (_, q), (_, k), *_ = inputs
    batch, _, heads, group, _ = q.shape
    rows, keys, warps, stages = tiles(group, dim, q.dtype)[name]
    return pl.pallas_call(
        functools.partial(kernel, rows=rows, keys=keys, scale=dim**-0.5),
        grid=(k.shape[1] // keys if name == "keys" else pl.cdiv(q.shape[1], rows // group), heads, batch),
        in_specs=[spec(x) for x in inputs],
        out_specs=[spec(x) for x in outputs],
        out_shape=[None if x is None else jax.ShapeDtypeStruct(x[1].shape, x[1].dtype) for x in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=kernel.__name__,
    )(*[None if x is None else x[1] for x in inputs])


def grown(length: int) -> int:
    return pl.cdiv(length, PADDING) * PADDING


def prepare(q, k, v, log_beta, segment_ids, start, *more):
    """The arrays as the kernels take them, time and D padded.

    These are q, k, v, log_beta [B,H,T] in base 2, start [1], first [B,Tq] and last [B,T] (None where no document ends), and more.
    """
    padded, dim = grown(k.shape[1]), pl.next_power_of_2(max(q.shape[-1], 16))
    first, last = (None, None) if segment_ids is None else document_bounds(segment_ids, *k.shape[:2], padded)
    first = None if first is None else of_queries(first, start, grown(q.shape[1]))
    q, k, v, *more = (grow(grow(x, 1, grown(x.shape[1])), -1, dim) for x in (q, k, v, *more))
    log_beta = None if log_beta is None else jnp.swapaxes(grow(log_beta * LOG2E, 1, padded), 1, 2)
    return q, k, v, log_beta, None if start is None else start[None], first, last, *more


def of_kind(kind, x):
    return None if x is None else (kind, x)


def forward(q, k, v, log_beta, segment_ids, start, interpret=False):
    batch, length, heads, group, dim = q.shape
    q, k, v, log_beta, start, first, _ = prepare(q, k, v, log_beta, segment_ids, start)
    padded = q.shape[1]
    inputs = [("q", q), ("k", k), ("k", v), of_kind("head", log_beta), of_kind("start", start), of_kind("row", first)]
    lse = jax.ShapeDtypeStruct((batch, heads, padded * group), jnp.float32)
    mass = None if log_beta is None else jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32)
    outputs = [("q", q), ("head", lse), of_kind("head", mass)]
    out, lse, mass = call(forward_kernel, "forward", dim, inputs, outputs, interpret)
    lse = jnp.swapaxes(lse.reshape(batch, heads, padded, group), 2, 3)[..., :length]
    return out[:, :length, ..., :dim], None if mass is None else jnp.swapaxes(mass, 1, 2)[:, :length], lse


def backward(q, k, v, log_beta, segment_ids, start, lse, delta, dout, dmass, interpret=False):
    batch, length, heads, group, dim = q.shape
    whole = k.shape[1]
    q, k, v, log_beta, start, first, last, dout = prepare(q, k, v, log_beta, segment_ids, start, dout)
    padded = q.shape[1]
    lse, delta = (jnp.swapaxes(grow(x, 3, padded), 2, 3).reshape(batch, heads, padded * group) for x in (lse, delta))
    dmass = None if dmass is None else jnp.swapaxes(grow(dmass, 1, padded), 1, 2)
    arrays = [("q", q), ("k", k), ("k", v), of_kind("head", log_beta)]
    start = of_kind("start", start)
    of_rows = [("head", lse), ("head", delta), ("q", dout)]
    [dq] = call(queries_kernel, "queries", dim, [*arrays, start, of_kind("row", first), *of_rows], arrays[:1], interpret)
    inputs = [*arrays, start, of_kind("row", last), *of_rows, of_kind("head", dmass)]
    dk, dv, dlog_beta = call(keys_kernel, "keys", dim, inputs, arrays[1:], interpret)
    dk, dv = (x[:, :whole, ..., :dim] for x in (dk, dv))
    return dq[:, :length, ..., :dim], dk, dv, None if dlog_beta is None else jnp.swapaxes(dlog_beta, 1, 2)[:, :whole]


def retention_attention(q, k, v, log_beta=None, segment_ids=None, start=None, interpret=False):
    """As the operation of this name. interpret: what pallas_call takes."""
    passes = (functools.partial(f, interpret=interpret) for f in (forward, backward))
    return differentiable(*passes)(q, k, v, log_beta, segment_ids, start)
