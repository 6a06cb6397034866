"""What compact moves and how long it takes."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compact import cases, compact, gpu, tpu
from pallas_kernels.compact.plan import changes, plan, scratch, spans

REPEATS = 8


def planned(slots: jax.Array, new_slots: jax.Array) -> list[jax.Array]:
    """The TPU kernel's plan for one sequence, slots [1,N,g,LANES] and new_slots [1,n,g',LANES]: the blocks it writes, then what it fetches of each kind."""
    blocks, block = slots.shape[1], slots[0, 0].size
    both = [spans(x, blocks, block) for x in (slots, new_slots)]
    kept = 1 + jnp.maximum(*(jnp.max(x.high, axis=(1, 2)) for x in both))
    tables = [x[0] for x in jax.tree.leaves((changes(slots, kept), both))]
    shapes = scratch(blocks, blocks, new_slots.shape[1])

    def kernel(*refs):
        inputs, (counts, *outputs) = jax.tree.unflatten(jax.tree.structure((changes, both)), refs[: len(tables)]), refs[len(tables) :]
        ...
