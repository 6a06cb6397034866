"""The sizes that compact is tested at and compiled for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cached_cases import trained
from pallas_kernels.compact.reference import Buffer, Pool


@dataclasses.dataclass(frozen=True)
class Case:
    """segments: the lengths that each sequence's streams cycle through. kept: the share of pool and of buffer entries that stay, for each stream by turns."""

    layers: int
    heads: int
    dim: int
    slots: int
    width: int
    segments: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[float, float], ...]
    dtype: str = "bfloat16"


def shapes(case: Case) -> dict:
    batch, cells = len(case.segments), (case.layers, len(case.segments), case.heads, case.width)
    pool = (batch, case.slots)
    shape = jax.ShapeDtypeStruct

    def fields(cells, position):
        entries = shape((*cells, case.dim), case.dtype)
        return entries, entries, shape(cells, jnp.float32), shape(position, jnp.int32)

    entries = case.slots + case.layers * case.heads * case.width
    return {
        "pool": Pool(*fields(pool, pool)),
        "buffer": Buffer(*fields(cells, (batch, case.width))),
        "destinations": shape((batch, entries), jnp.int32),
    }


def keep(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(keep [B,C] bool, stream of each slot [B,C], keep of the buffer [B,S,W] bool), never more than C in all."""
    random = np.random.default_rng(seed)
    streams = case.layers * case.heads
    shares = np.array([case.kept[s % len(case.kept)] for s in range(streams)])
    rows = []
    for lengths in case.segments:
        lengths = np.resize(lengths, streams)
        stream = np.repeat(np.arange(streams), lengths)
        old = np.zeros(case.slots, bool)
        old[: len(stream)] = random.random(len(stream)) < shares[stream, 0]
        new = random.random((streams, case.width)) < shares[:, 1:]
        surplus = int(old.sum() + new.sum()) - case.slots
        if surplus > 0:
            at = np.flatnonzero(new.ravel())
            new.ravel()[random.choice(at, surplus, replace=False)] = False
        rows.append((old, np.pad(stream, (0, case.slots - len(stream)), constant_values=streams), new))
    return tuple(np.stack(x) for x in zip(*rows, strict=True))


def destinations(case: Case, seed: int = 0) -> np.ndarray:
    """[B, C+S*W] int32: streams end to end, in each what the pool keeps before what the buffer keeps."""
    old, stream, new = keep(case, seed)
    batch, streams, width = new.shape
    stream = np.concatenate([stream, np.broadcast_to(np.repeat(np.arange(streams), width), (batch, streams * width))], axis=1)
    kept = np.concatenate([old, new.reshape(batch, -1)], axis=1)
    order = np.argsort(np.where(kept, stream, streams + 1), axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")
    return np.where(kept, rank, case.slots).astype(np.int32)


def arrays(case: Case, seed: int = 0) -> dict:
    """Random arguments; what is dropped or dead is NaN, and of what is kept some stats are -inf and some keys -0.0, infinite or NaN."""
    random = np.random.default_rng(seed)
    given, goes = shapes(case), destinations(case, seed)
    batch, streams = len(case.segments), case.layers * case.heads
    dropped = goes >= case.slots
    dropped_new = np.moveaxis(dropped[:, case.slots :].reshape(batch, case.layers, case.heads, case.width), 1, 0)

    def fields(shapes, dropped):
        keys, values = (random.standard_normal(x.shape, np.float32) for x in shapes[:2])
        keys[..., 0] = random.choice([-0.0, np.inf, np.nan, 1.0], keys.shape[:-1])
        stat = np.where(random.random(shapes[2].shape) < 0.1, -np.inf, random.standard_normal(shapes[2].shape))
        keys[dropped], values[dropped], stat[dropped] = np.nan, np.nan, np.nan
        position = random.integers(0, 2**31 - 1, shapes[3].shape)
        return jnp.asarray(keys, case.dtype), jnp.asarray(values, case.dtype), jnp.asarray(stat, jnp.float32), jnp.asarray(position, jnp.int32)

    assert streams * case.width == goes.shape[1] - case.slots
    return {
        "pool": Pool(*fields(given["pool"], dropped[:, : case.slots])),
        "buffer": Buffer(*fields(given["buffer"], dropped_new)),
        "destinations": jnp.asarray(goes),
    }


SMALL = {
    "one slot": Case(1, 1, 64, 1, 1, ((1,),), ((1.0, 0.0),)),
    # The last stream moves far to the right, over several of the TPU kernel's smallest blocks.
    "nothing dropped": Case(3, 2, 64, 1900, 120, ((10, 0, 5, 0, 0, 1100),), ((1.0, 1.0),), "float32"),
    "nothing changes": Case(3, 2, 64, 1900, 120, ((300,),), ((1.0, 0.0),), "float32"),
    "everything dropped": Case(3, 2, 64, 1900, 120, ((300, 250, 0, 310),), ((0.0, 0.0),), "float32"),
    # Only what lies in the middle, or before it, or behind it, moves.
    "a stream dropped": Case(3, 2, 64, 1900, 120, ((200, 100, 250, 150),), ((1.0, 0.0), (0.0, 0.0), (1.0, 0.0), (1.0, 0.5)), "float32"),
    "one stream grows": Case(3, 2, 64, 1900, 120, ((200, 100, 250, 30),), ((1.0, 0.0), (1.0, 1.0), (1.0, 0.0), (1.0, 0.0)), "float32"),
    # Streams grow and shrink, C is a multiple of nothing, rows are unequal.
    "grow and shrink": Case(3, 2, 128, 1003, 70, ((200, 31, 0, 400, 100, 272), (0, 0, 1003, 0, 0, 0)), ((0.3, 0.9), (0.95, 0.1), (0.6, 0.6))),
    "one swallows all": Case(2, 2, 64, 700, 300, ((170, 180, 175, 175),), ((0.0, 0.0), (0.0, 0.0), (1.0, 1.0), (0.1, 1.0)), "float32"),
    # Later slots of the second stream move left, earlier ones right.
    "both ways inside a stream": Case(1, 2, 256, 900, 200, ((100, 800),), ((1.0, 1.0), (0.6, 0.3))),
}


def real(layers: int, heads: int, dim: int, budget: int, width: int, batch: int, dtype: str = "bfloat16") -> Case:
    """A full pool and a full buffer; as many stay as before, by chance wherever they are."""
    stay = budget / (budget + width)
    segments = tuple(trained(layers, heads, budget, seed) for seed in range(batch))
    return Case(layers, heads, dim, layers * heads * budget, width, segments, ((stay, stay),), dtype)


# Qwen3-4B and Qwen3-8B have the same heads.
REAL = {
    "Qwen3-4B/8B M=512 W=64 B=1": real(36, 8, 128, 512, 64, 1),
    "Qwen3-4B/8B M=512 W=256 B=1": real(36, 8, 128, 512, 256, 1),
    "Qwen3-4B/8B M=512 W=64 B=32": real(36, 8, 128, 512, 64, 32),
    "Qwen3-4B/8B M=4096 W=256 B=1": real(36, 8, 128, 4096, 256, 1),
    "SmolLM2-135M M=512 W=256 f32": real(30, 3, 64, 512, 256, 1, "float32"),
}
