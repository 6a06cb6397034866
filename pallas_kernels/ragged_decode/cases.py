"""The sizes that ragged_decode is tested at and compiled for."""

import dataclasses

import jax

from pallas_kernels import cached_cases
from pallas_kernels.cached_cases import trained


@dataclasses.dataclass(frozen=True)
class Case:
    """segments are the lengths that each sequence's streams cycle through; the slots and buffer rows past them are dead."""

    layers: int
    heads: int
    group: int
    dim: int
    slots: int
    width: int
    buffered: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...]
    layer: int = 0
    dtype: str = "bfloat16"


def shapes(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    return cached_cases.shapes(case)


def arrays(case: Case, seed: int = 0) -> dict[str, jax.Array]:
    """Random arguments; every slot and buffer row that must not matter is NaN."""
    return cached_cases.arrays(case, seed=seed)


SMALL = {
    # Nothing cached: the output is the token's own value.
    "empty": Case(1, 1, 1, 64, slots=8, width=8, buffered=(0,), segments=((0,),), dtype="float32"),
    "one entry each": Case(2, 2, 2, 128, slots=16, width=8, buffered=(1,), segments=((1,),), layer=1, dtype="float32"),
    "pool and buffer full": Case(2, 2, 4, 128, slots=256, width=32, buffered=(32,), segments=((64,),), layer=1),
    # One stream owns nine tenths; segments start anywhere; sizes are multiples of nothing.
    "one huge stream": Case(3, 3, 3, 64, slots=3001, width=70, buffered=(33, 70), segments=((37, 2611, 0, 1, 5), (3, 0, 250)), dtype="float32"),
    "unequal batch": Case(2, 4, 2, 128, slots=2500, width=64, buffered=(0, 17, 64), segments=((0,), (301, 7, 0, 1, 513), (2499, 0, 0, 0, 0, 0, 0, 1))),
    "dead tail in the last tile": Case(1, 2, 4, 128, slots=1003, width=10, buffered=(3,), segments=((500, 501),)),
    "wide heads": Case(2, 2, 4, 256, slots=1200, width=48, buffered=(20, 48), segments=((190, 333), (0, 599)), layer=1),
    "slots along lanes": Case(2, 2, 2, 64, slots=2560, width=256, buffered=(130, 256), segments=((611, 500), (1, 1279)), layer=1),
    "full cache": Case(2, 2, 2, 128, slots=0, width=600, buffered=(599, 0), segments=((0,), (0,)), layer=1),
}


def qwen3(budget: int, width: int, batch: int) -> Case:
    """Qwen3-4B and Qwen3-8B have the same heads. The buffers are in all states between empty and full."""
    buffered = tuple(width // 2 + row * width // (2 * batch) for row in range(batch))
    segments = tuple(trained(36, 8, budget, seed) for seed in range(batch))
    return Case(36, 8, 4, 128, slots=36 * 8 * budget, width=width, buffered=buffered, segments=segments, layer=17)


REAL = {
    "Qwen3-4B/8B M=512 B=1": qwen3(512, 64, 1),
    "Qwen3-4B/8B M=512 B=32": qwen3(512, 64, 32),
    "Qwen3-4B/8B M=4096 B=1": qwen3(4096, 256, 1),
    "Qwen3-4B/8B M=4096 B=32": qwen3(4096, 256, 32),
    "Qwen3-4B/8B full cache of 32K": Case(36, 8, 4, 128, slots=0, width=32768, buffered=(32000,), segments=((0,),), layer=17),
    "SmolLM2-135M M=8192 f32": Case(30, 3, 3, 64, 90 * 8192, 64, buffered=(40,), segments=(trained(30, 3, 8192, 0),), layer=11, dtype="float32"),
    "D=256 M=512 B=8": Case(26, 4, 2, 256, 26 * 4 * 512, 64, (64, 0, 9, 31, 50, 64, 1, 2), tuple(trained(26, 4, 512, i) for i in range(8)), layer=3),
}
