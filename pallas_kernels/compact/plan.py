"""In which order the pool's blocks are rewritten, and what each of them is made of: what lets the TPU kernel work in place.

A block of slots is written once and whole, with all that moves to it or stays in it. So it must not be written before everything it held has been
read. Entries keep their order, so what crosses the border of two blocks all goes the same way: right, then the right block has to be written first, or
left, then the left one. An entry that passes several borders gives all of them its direction. Edges between neighbours on a line make no cycle, so an
order exists, and two sweeps follow it: up, over the blocks whose right border nothing crosses to the right, then down, over the others.

The plan is scalar work, a few loops over the blocks: the kernel does it itself, before anything else, and faster than XLA would.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # entries that move together, by one matrix product


class Spans(NamedTuple):
    """Where the entries of n sources go, the pool's N blocks or the buffer's S streams, of g groups of LANES entries each. All int32."""

    low: jax.Array  # [B, 1, n*g] the first slot that an entry of the group goes to; past the pool if there is none
    high: jax.Array  # [B, 1, n*g] the last one; -1 if there is none
    begin: jax.Array  # [B, 1, n] the first and the last block that an entry of the source goes to, likewise
    end: jax.Array  # [B, 1, n]


class Fetches(NamedTuple):
    """What the plan says of n sources, in SMEM."""

    source: jax.Array  # [2n] int32, what to fetch, in order: in each sweep everything at most once
    first: jax.Array  # [N] int32, the fetch that a block begins with, often the one that the block before it ended with ...
    count: jax.Array  # [N] int32, ... and how many it needs


def tables(pool: jax.Array, buffer: jax.Array) -> tuple[jax.Array, list[Spans]]:
    """What `plan` starts from, of the slots that the entries of the pool [B,N,g,LANES] and of the buffer [B,n,g',LANES] go to, past the last block if
    they are dropped: which blocks have a slot that gets another entry [B,1,N], 0 or 1, and the Spans of both. All int32.
    """
    # (With four axes XLA takes seconds to compile these reductions.)
    groups, new_groups = (x.reshape(x.shape[0], -1, LANES) for x in (pool, buffer))
    spans = [span(x, y.shape[1], pool[0, :, :, 0].size * LANES, pool[0, 0].size) for x, y in ((groups, pool), (new_groups, buffer))]
    kept = 1 + jnp.maximum(*(jnp.max(x.high, axis=(1, 2)) for x in spans))
    slot = jnp.arange(groups[0].size, dtype=jnp.int32).reshape(groups.shape[1:])
    changes = jnp.any((groups != slot) & (slot < kept[:, None, None]), axis=2).reshape(*pool.shape[:3])
    return jnp.any(changes, axis=2).astype(jnp.int32)[:, None], spans


def span(groups: jax.Array, sources: int, slots: int, block: int) -> Spans:
    """groups [B,n*g,LANES]: the slots that entries go to, `slots` or more if they are dropped."""
    low, high = jnp.min(groups, axis=2), jnp.max(jnp.where(groups < slots, groups, -1), axis=2)
    begin, end = (x(y.reshape(y.shape[0], sources, -1), axis=2) // block for x, y in ((jnp.min, low), (jnp.max, high)))
    return Spans(*(x[:, None] for x in (low, high, begin, end)))


def scratch(blocks: int, *sources: int) -> list:
    """SMEM for the plan: target, down, and the Fetches of each kind of source."""
    memory = lambda n: pltpu.SMEM((n,), jnp.int32)  # noqa: E731
    return [memory(blocks), memory(blocks), *(Fetches(memory(2 * n), memory(blocks), memory(blocks)) for n in sources)]


def plan(changes, spans, target, down, fetches) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Fills target [N], the blocks in the order in which they are to be rewritten, and the Fetches of each kind, from their Spans. The pool comes first.

    down [N] is for its own use. All are refs. Returns how many blocks are rewritten, and how many fetches each kind takes.
    """
    blocks = target.shape[0]
    for span, fetch in zip(spans, fetches, strict=True):
        extent(span, fetch, blocks)

    # Whether an entry of this block or of one before it goes past this block's end.
    @functools.partial(jax.lax.fori_loop, 0, blocks, init_val=-1)
    def _(block, furthest):
        furthest = jnp.maximum(furthest, spans[0].end[0, block])
        down[block] = (furthest > block).astype(jnp.int32)
        return furthest

    def visit(i, state):
        upwards = i < blocks
        block = jnp.where(upwards, i, 2 * blocks - 1 - i)

        def rewrite(steps, *kinds):
            target[steps] = block
            return steps + 1, *(need(fetch, block, upwards, *kind) for fetch, kind in zip(fetches, kinds, strict=True))

        wanted = (changes[0, block] == 1) & (down[block] == jnp.where(upwards, 0, 1))
        return jax.lax.cond(wanted, rewrite, lambda *state: state, *state)

    steps, *kinds = jax.lax.fori_loop(0, 2 * blocks, visit, (0, *[(0, -1)] * len(fetches)))
    return steps, tuple(total for total, _ in kinds)


def extent(span: Spans, fetch: Fetches, blocks: int):
    """For now, fetch.first and fetch.count are the first and the last source that has entries for each block; those between have too, or none at all."""
    sources = span.begin.shape[1]

    def fill(ref, start, stop, value):
        @pl.loop(start, stop)
        def _(block):
            ref[block] = value

    def ascend(source, done):
        stop = span.end[0, source] + 1
        fill(fetch.first, done, stop, source)
        return jnp.maximum(done, stop)

    def descend(i, done):
        source = sources - 1 - i
        start = span.begin[0, source]
        fill(fetch.count, start, done, source)
        return jnp.minimum(done, start)

    fill(fetch.first, jax.lax.fori_loop(0, sources, ascend, 0), blocks, sources)
    fill(fetch.count, 0, jax.lax.fori_loop(0, sources, descend, blocks), -1)


def need(fetch: Fetches, block, upwards, total, newest):
    """Adds what `block` needs to `total` fetches, the last of which was `newest`; returns both."""
    first, last = fetch.first[block], fetch.count[block]
    count = jnp.maximum(last - first + 1, 0)
    begin, step = jnp.where(upwards, first, last), jnp.where(upwards, 1, -1)
    # What was fetched last is still there.
    there = ((count > 0) & (begin == newest)).astype(jnp.int32)
    start = total - there
    fetch.first[block], fetch.count[block] = start, count

    @pl.loop(there, count)
    def _(i):
        fetch.source[start + i] = begin + step * i

    return start + count, jnp.where(count > 0, begin + step * (count - 1), newest)
