"""What the cases of operations on pool and write buffer share. A case has layers, heads, dim, slots, segments: the lengths that each sequence's streams
cycle through; those of ragged_decode and ragged_prefill also group, width, buffered, layer and dtype."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


def trained(layers: int, heads: int, budget: int, seed: int) -> tuple[int, ...]:
    """Lengths as trained gates leave them: `budget` entries a stream on average, a few streams with most of them."""
    share = np.random.default_rng(seed).lognormal(sigma=1.0, size=layers * heads)
    return tuple(int(n) for n in share / share.sum() * budget * layers * heads)


def starts(case) -> np.ndarray:
    """[B,S+1] int32."""
    lengths = np.array([np.resize(lengths, case.layers * case.heads) for lengths in case.segments])
    return np.pad(np.cumsum(lengths, axis=1), ((0, 0), (1, 0))).astype(np.int32)


def shapes(case, *tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of an attention; q, k, v have the axes `tokens` after the batch."""
    batch, dtype = len(case.buffered), jnp.dtype(case.dtype)
    own, pool = (batch, *tokens, case.heads, case.dim), (batch, case.slots, case.dim)
    buffer = (case.layers, batch, case.heads, case.width, case.dim)
    entries = dict(q=(*own[:-1], case.group, case.dim), k=own, v=own, pool_keys=pool, pool_values=pool, buffer_keys=buffer, buffer_values=buffer)
    integers = dict(starts=(batch, case.layers * case.heads + 1), buffered=(batch,), layer=())
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in entries.items()} | {
        name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in integers.items()
    }


def arrays(case, *tokens: int, seed: int) -> dict[str, jax.Array]:
    """Those arguments, random; every slot and buffer row that must not matter is NaN."""
    random = np.random.default_rng(seed)
    given = {name: random.standard_normal(x.shape, np.float32) for name, x in shapes(case, *tokens).items() if x.dtype != jnp.int32}
    for row, (buffered, end) in enumerate(zip(case.buffered, starts(case)[:, -1], strict=True)):
        for name in ("pool_keys", "pool_values"):
            given[name][row, end:] = np.nan
        for name in ("buffer_keys", "buffer_values"):
            given[name][:, row, :, buffered:] = np.nan
    integers = dict(starts=starts(case), buffered=case.buffered, layer=case.layer)
    return {name: jnp.asarray(x, case.dtype) for name, x in given.items()} | {name: jnp.asarray(x, jnp.int32) for name, x in integers.items()}


def four_layers(case):
    """The case cut to 4 layers, to be timed: one is attended to, the others only fill the memory."""
    segments = tuple(lengths[: 4 * case.heads] for lengths in case.segments)
    slots = max(sum(np.resize(lengths, 4 * case.heads)) for lengths in segments) if case.slots else 0
    return dataclasses.replace(case, layers=4, layer=2, slots=-(-int(slots) // 128) * 128, segments=segments)
