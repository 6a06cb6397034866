"""In which order the pool's blocks are rewritten, and what each of them is made of: what lets the TPU kernel work in place.

A block of slots is written once and whole, with all that moves to it or stays in it. So it must not be written before everything it held has been
read. Entries keep their order, so what crosses the border of two blocks all goes the same way: right, then the right block has to be written first, or
left, then the left one. An entry that passes several borders gives all of them its direction. Edges between neighbours on a line make no cycle, so an
order exists, and two sweeps follow it: up, over the blocks whose right border nothing crosses to the right, then down, over the others.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LANES = 128  # entries that move together, by one matrix product


class Sources(NamedTuple):
    """What is fetched: for the pool n = N blocks of slots, for the buffer n = S streams, of g groups of LANES entries each. All int32."""

    low: jax.Array  # [B, n*g] the first slot that an entry of the group goes to, past the pool if there is none ...
    high: jax.Array  # [B, n*g] ... and the last, -1 if there is none
    fetches: jax.Array  # [B, 2n] what to fetch, in order: in each sweep everything at most once
    total: jax.Array  # [B, 1] fetches in all
    first: jax.Array  # [B, N] the fetch that each step begins with, often the one that the step before ended with ...
    count: jax.Array  # [B, N] ... and how many it needs


class Plan(NamedTuple):
    """steps[b, 0] of N blocks are rewritten: target[b, 0], target[b, 1], ..."""

    steps: jax.Array  # [B, 1] int32
    target: jax.Array  # [B, N] int32
    pool: Sources
    buffer: Sources


def plan(pool: jax.Array, buffer: jax.Array) -> Plan:
    """pool [B,N,g,LANES], buffer [B,S,g',LANES] int32: the slot that each entry moves to, past the last block if it is dropped."""
    blocks, block = pool.shape[1], pool.shape[2] * LANES
    number = jnp.arange(blocks, dtype=jnp.int32)
    # [B, n, g]
    spans = [(jnp.min(x, axis=3), jnp.max(jnp.where(x < blocks * block, x, -1), axis=3)) for x in (pool, buffer)]
    kept = 1 + jnp.maximum(*(jnp.max(high, axis=(1, 2)) for _, high in spans))
    slot = jnp.arange(blocks * block, dtype=jnp.int32).reshape(pool.shape[1:])
    changes = jnp.any((pool != slot) & (slot < kept[:, None, None, None]), axis=(2, 3))
    down = jax.lax.cummax(jnp.max(spans[0][1], axis=2), axis=1) >= (number + 1) * block
    order = jnp.where(changes, jnp.where(down, 2 * blocks - number, number), 2 * blocks + 1)
    columns = [order, jnp.broadcast_to(number, order.shape), down.astype(jnp.int32)]
    for low, high in spans:
        # The first and the last source that has entries for each block; those between have too, or none at all. [B, N]
        low, high = jax.lax.cummin(jnp.min(low, axis=2), axis=1, reverse=True), jax.lax.cummax(jnp.max(high, axis=2), axis=1)
        columns.append(jnp.sum(high[:, None] < number[:, None] * block, axis=2, dtype=jnp.int32))
        columns.append(jnp.sum(low[:, None] < (number[:, None] + 1) * block, axis=2, dtype=jnp.int32) - 1)
    order, target, down, *ends = jax.lax.sort(columns, dimension=1, num_keys=1)
    active = order <= 2 * blocks
    sources = [
        Sources(low.reshape(low.shape[0], -1), high.reshape(high.shape[0], -1), *fetches(first, last, down == 1, active, 2 * low.shape[1]))
        for (low, high), first, last in zip(spans, ends[::2], ends[1::2], strict=True)
    ]
    return Plan(jnp.sum(active, axis=1, keepdims=True, dtype=jnp.int32), target, *sources)


def fetches(first: jax.Array, last: jax.Array, down: jax.Array, active: jax.Array, most: int) -> tuple[jax.Array, ...]:
    """The last four fields of Sources, for steps that need first..last (nothing if last < first), the other way round on the way down: [B,N] each."""
    count = jnp.where(active, jnp.maximum(last - first + 1, 0), 0)
    begin, end = jnp.where(down, last, first), jnp.where(down, first, last)
    # What a step begins with is there if the step before it ended with it.
    there = (count[:, 1:] > 0) & (count[:, :-1] > 0) & (begin[:, 1:] == end[:, :-1])
    fetched = jnp.cumsum(count - jnp.pad(there, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    # The step that each fetch is made for, and how far from the step's first: [B, most]
    fetch = jnp.arange(most, dtype=jnp.int32)
    step = jnp.minimum(jnp.sum(fetched[:, None] <= fetch[:, None], axis=2), fetched.shape[1] - 1)
    start, begin, down = (jnp.take_along_axis(x, step, axis=1) for x in (fetched - count, begin, down))
    return begin + jnp.where(down, start - fetch, fetch - start), fetched[:, -1:], fetched - count, count
