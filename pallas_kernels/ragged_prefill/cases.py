"""The sizes that ragged_prefill is tested at and compiled for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import cached_cases
from pallas_kernels.cached_cases import trained


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


def shapes(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    return cached_cases.shapes(case, case.tokens) | {"valid": jax.ShapeDtypeStruct((len(case.valid),), jnp.int32)}


def arrays(case: Case, seed: int = 0) -> dict[str, jax.Array]:
    """Random arguments; every slot, buffer row and token that must not matter is NaN."""
    given = cached_cases.arrays(case, case.tokens, seed=seed)
    padding = np.arange(case.tokens) >= np.array(case.valid)[:, None]
    for name in ("q", "k", "v"):
        given[name] = jnp.where(padding.reshape(*padding.shape, *[1] * (given[name].ndim - 2)), jnp.nan, given[name])
    return given | {"valid": jnp.asarray(case.valid, jnp.int32)}


SMALL = {
    "one token": Case(1, 1, 1, 64, tokens=1, slots=8, width=8, valid=(1,), buffered=(0,), segments=((0,),), dtype="float32"),
    "smaller than a tile": Case(2, 1, 2, 8, 3, 5, 3, valid=(3, 2), buffered=(3, 0), segments=((2, 3), (0, 5)), layer=1, dtype="float32"),
    # Nothing cached, two blocks of queries of the TPU's kernel and two of its keys, none of them full.
    "empty cache": Case(2, 2, 4, 128, 300, 64, 16, valid=(300,), buffered=(0,), segments=((0,),)),
    "pool and buffer full": Case(2, 2, 4, 128, 64, 1024, 64, valid=(64,), buffered=(64,), segments=((256,),), layer=1),
    # One stream owns nine tenths, more than a block; segments start anywhere; sizes are multiples of nothing.
    "one huge stream": Case(2, 2, 3, 64, 70, 1531, 37, (70, 1), (33, 37), segments=((37, 1400, 0, 1), (3, 1500, 27, 1)), dtype="float32"),
    "unequal batch": Case(2, 2, 2, 128, 41, 1200, 40, (41, 0, 17), (0, 40, 9), segments=((0,), (301, 7, 0, 1), (0, 2, 600, 598)), layer=1),
    # The TPU's last blocks would run past the end.
    "blocks moved back": Case(1, 2, 1, 128, 16, 848, 592, valid=(16,), buffered=(592,), segments=((7, 841),), dtype="float32"),
    "tails alone matter": Case(1, 2, 4, 128, 20, 1003, 301, valid=(20,), buffered=(301,), segments=((1000, 3),)),
    "wide heads": Case(2, 1, 7, 256, 50, 600, 48, valid=(50, 33), buffered=(20, 48), segments=((90, 333), (0, 599)), layer=1, dtype="float32"),
    "slots along lanes": Case(2, 2, 2, 64, 40, 2560, 256, valid=(40, 40), buffered=(130, 256), segments=((611, 500), (1, 1279)), layer=1),
    # The buffer lies along lanes, the chunk of several blocks along rows.
    "full cache": Case(2, 1, 3, 64, 300, 0, 600, valid=(300, 29), buffered=(599, 0), segments=((0,), (0,)), layer=1),
}


def real(layers: int, heads: int, group: int, dim: int, tokens: int, budget: int, batch: int, dtype: str = "bfloat16") -> Case:
    """A full pool and, as after an eviction, an empty buffer of the chunk's size. All chunks are full but those of every other sequence."""
    valid = tuple(tokens if row % 2 == 0 else tokens * (row + 1) // (batch + 1) for row in range(batch))
    segments = tuple(trained(layers, heads, budget, seed) for seed in range(batch))
    slots = layers * heads * budget
    return Case(layers, heads, group, dim, tokens, slots, tokens, valid, (0,) * batch, segments, layers // 2, dtype)


# Qwen3-4B and Qwen3-8B have the same heads.
REAL = {
    f"Qwen3-4B/8B T={tokens} M={budget} B={batch}": real(36, 8, 4, 128, tokens, budget, batch)
    for tokens in (256, 1024)
    for budget in (512, 4096)
    for batch in (1, 8)
} | {
    "Qwen3-4B/8B T=256 full cache of 32K": Case(36, 8, 4, 128, 256, 0, 32768, valid=(256,), buffered=(32000,), segments=((0,),), layer=18),
    "SmolLM2-135M T=256 M=256 f32": real(30, 3, 3, 64, 256, 256, 1, "float32"),
    "SmolLM2-135M T=256 M=2048 f32": real(30, 3, 3, 64, 256, 2048, 1, "float32"),
    "D=256 T=256 M=512 B=8": real(26, 4, 2, 256, 256, 512, 8),
    "D=256 T=512 M=512 f32": real(26, 4, 4, 256, 512, 512, 1, "float32"),
    # No multiples of 16, but of 8: elsewhere v5p has layouts of its own, and XLA copies.
    "unaligned T=296 G=7 M=514 B=3": real(36, 3, 7, 128, 296, 514, 3),
}
