"""The sizes that ragged_prefill is tested at and compiled for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """tokens is T, valid how many of them count in each sequence; segments are the lengths that each sequence's streams cycle through."""

    layers: int
    heads: int
    group: int
    dim: int
    tokens: int
    slots: int
    width: int
    valid: tuple[int, ...]
    buffered: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...]
    layer: int = 0
    dtype: str = "bfloat16"


def starts(case: Case) -> np.ndarray:
    """[B,S+1] int32."""
    streams = case.layers * case.heads
    lengths = np.array([np.resize(lengths, streams) for lengths in case.segments])
    return np.pad(np.cumsum(lengths, axis=1), ((0, 0), (1, 0))).astype(np.int32)


def shapes(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    batch, dtype = len(case.valid), jnp.dtype(case.dtype)
    chunk = (batch, case.tokens, case.heads, case.dim)
    pool = (batch, case.slots, case.dim)
    buffer = (case.layers, batch, case.heads, case.width, case.dim)
    entries = dict(k=chunk, v=chunk, pool_keys=pool, pool_values=pool, buffer_keys=buffer, buffer_values=buffer)
    integers = dict(valid=(batch,), starts=(batch, case.layers * case.heads + 1), buffered=(batch,), layer=())
    return (
        {"q": jax.ShapeDtypeStruct((*chunk[:3], case.group, case.dim), dtype)}
        | {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in entries.items()}
        | {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in integers.items()}
    )


def arrays(case: Case, seed: int = 0) -> dict[str, jax.Array]:
    """Random arguments; every slot, buffer row and token that must not matter is NaN."""
    random = np.random.default_rng(seed)
    given = {name: random.standard_normal(x.shape, np.float32) for name, x in shapes(case).items() if x.dtype != jnp.int32}
    for row, (valid, buffered, end) in enumerate(zip(case.valid, case.buffered, starts(case)[:, -1], strict=True)):
        for name in ("q", "k", "v"):
            given[name][row, valid:] = np.nan
        for name in ("pool_keys", "pool_values"):
            given[name][row, end:] = np.nan
        for name in ("buffer_keys", "buffer_values"):
            given[name][:, row, :, buffered:] = np.nan
    integers = dict(valid=case.valid, starts=starts(case), buffered=case.buffered, layer=case.layer)
    return {name: jnp.asarray(x, case.dtype) for name, x in given.items()} | {name: jnp.asarray(x, jnp.int32) for name, x in integers.items()}


SMALL = {
    # Nothing cached, one token: the output is that token's value.
    "one token": Case(1, 1, 1, 64, 1, 8, 8, valid=(1,), buffered=(0,), segments=((0,),), dtype="float32"),
}
