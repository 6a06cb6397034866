"""What compact moves and how long it takes."""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.compact import cases, compact, tpu
from pallas_kernels.compact.plan import LANES, plan, scratch, tables

REPEATS = 32


@jax.jit
def planned(pool: jax.Array, buffer: jax.Array) -> tuple[jax.Array, ...]:
    """The TPU kernel's plan for one sequence, as tpu.grouped has it: pool [1,N,g,LANES], buffer [1,n,g',LANES].

    Returns [3] how many blocks it writes and what it fetches of pool and buffer; then these, in order: [N], [2N], [2n].
    """
    known = jax.tree.map(lambda x: x[0], tables(pool, buffer))

    def kernel(known, counts, target, down, *fetches):
        steps, totals = plan(*known, target, down, fetches)
        for i, count in enumerate((steps, *totals)):
            counts[i] = count

    memory = [*scratch(3)[:1], *scratch(pool.shape[1], pool.shape[1], buffer.shape[1])]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), memory)
    counts, target, _, *fetches = pl.pallas_call(kernel, out_shape=shapes, interpret=True)(known)
    return counts, target, *(x.source for x in fetches)


def traffic(case: cases.Case, target: str) -> tuple[int, int]:
    """(fewest, moved): the bytes of what changes its place, read once and written once, and the bytes that are moved.

    On a TPU these are the kernel's copies, without the slots, stats and positions that XLA brings into its order and back.
    """
    goes, given, slots, width = cases.destinations(case), cases.shapes(case), case.slots, case.width
    row = 2 * case.dim * jnp.dtype(case.dtype).itemsize
    # On a TPU a row fills its last lanes with nothing.
    lanes = -(-case.dim // LANES) * LANES
    kept = goes < slots
    fewest = 2 * (row + 8) * int(np.sum(kept & (goes != np.arange(goes.shape[1]))))
    if target == "h100":
        # Every kept row is read and every slot written. The destinations' inverse is filled and scattered to; keys, values and the rest read it.
        return fewest, (row + 8) * (int(kept.sum()) + kept.shape[0] * slots) + 4 * (goes.size + int(kept.sum()) + 4 * kept.shape[0] * slots)
    moved = 0
    for one in goes:
        pool, buffer = tpu.grouped(given["pool"], given["buffer"], jnp.asarray(one[None]))
        counts, *found = map(np.asarray, planned(pool, buffer))
        written, read, new = (x[:count] for x, count in zip(found, counts, strict=True))
        block, piece = (math.prod(x.shape[2:]) for x in (pool, buffer))
        new = new % -(-width // piece)
        # What is last has the rows that are left, but stats, positions and slots for all that there is room for.
        entries = sum(np.sum(np.minimum(total - x * size, size)) for x, size, total in ((written, block, slots), (read, block, slots), (new, piece, width)))
        moved += row * lanes // case.dim * int(entries) + 8 * block * len(written) + 12 * (block * len(read) + piece * len(new))
    return fewest, moved


def rows(platform: str, time: Callable) -> Iterator[dict]:
    """Measures the real cases, on a CPU the smallest. time(function, *arguments) -> seconds.

    Once, and then REPEATS times on the same memory, as in a program that the pool is donated to: what is not donated a TPU copies before it is compacted
    in place, and what is donated a GPU copies back.
    """

    def once(arguments):
        return compact(**arguments)

    def in_place(arguments):
        return jax.lax.fori_loop(0, REPEATS, lambda _, pool: compact(**{**arguments, "pool": pool}), arguments["pool"])

    for name, case in cases.REAL.items():
        if platform == "cpu" and not name.startswith("SmolLM2"):
            continue
        arguments = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cases.shapes(case)) | {"destinations": jnp.asarray(cases.destinations(case))}
        for label, function, times in ((name, once, 1), (f"{name}, in place", in_place, REPEATS)):
            fewest, moved = traffic(case, "h100" if platform == "gpu" else "tpu")
            yield {"operation": "compact", "shape": label, "seconds": time(function, arguments) / times, "bytes": fewest, "moved": moved}
