"""What ragged_prefill moves and how long it takes."""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from pallas_kernels.cached_cases import four_layers, starts
from pallas_kernels.ragged_prefill import cases, gpu, ragged_prefill, tpu


def _bounds(case: cases.Case) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Where what each (sequence, kv head) sees of pool and buffer begins and ends, [B,H]."""
    stream = case.layer * case.heads + np.arange(case.heads)
    bounds, buffered = starts(case), np.repeat(np.array(case.buffered)[:, None], case.heads, axis=1)
    return {"pool": (bounds[:, stream], bounds[:, stream + 1]), "buffer": (0 * buffered, buffered)}


def flops(case: cases.Case) -> int:
    """Of the two products, over what is seen."""
    valid = np.array(case.valid)
    cached = sum(end - begin for begin, end in _bounds(case).values()).sum(axis=1)
    return 4 * case.dim * case.group * int(np.sum(valid * cached + case.heads * valid * (valid + 1) // 2))


def traffic(case: cases.Case, target: str) -> tuple[int, int]:
    """(fewest, moved): the bytes that must move, each entry that is seen once for each kv head, and those that the kernel's programs do move.

    On a GPU most of what its programs load comes from its level-2 cache. On a TPU this is without the copies of q, k, v and the output in the
    kernel's order of axes, which XLA makes unless it finds a way to produce and use them like that.
    """
    batch, heads, group, dim, dtype = len(case.valid), case.heads, case.group, case.dim, jnp.dtype(case.dtype)
    valid, bounds = np.array(case.valid), _bounds(case)
    cached = sum(end - begin for begin, end in bounds.values())
    # Rows of `size` bytes.
    size = dim * dtype.itemsize
    fewest = int(np.sum(2 * cached) + heads * np.sum(valid * (group + 2)) + batch * heads * case.tokens * group) * size
    if target == "h100":
        rows, _, _ = gpu.tiling(batch, heads, case.tokens * group, dim, dtype)
        last_row = np.minimum(np.arange(0, case.tokens * group, rows) + rows, case.tokens * group) - 1
        alive = np.arange(0, case.tokens * group, rows) // group < valid[:, None]
        seen = np.where(alive, np.minimum(last_row // group + 1, valid[:, None]), 0)
        moved = 2 * np.sum(cached * alive.sum(axis=1)[:, None]) + 2 * heads * np.sum(seen) + 2 * batch * heads * case.tokens * group
        return fewest, int(moved) * size
    queries, block = tpu.queries_block(case.tokens, group, dtype), tpu.chunk_block(case.tokens)
    first = np.arange(0, case.tokens, queries)
    alive = first < valid[:, None]
    blocks = (-(-np.minimum(first + queries, valid[:, None]) // block) - 1) * alive
    moved = heads * queries * group * (np.sum(np.maximum(alive.sum(axis=1), 1)) + batch * len(first))
    moved += 2 * heads * block * (batch + np.sum(blocks))
    # Rows fill their last lanes with nothing.
    moved *= -(-dim // tpu.LANES) * tpu.LANES * dtype.itemsize
    for part in tpu.parts(case.slots, case.width, case.tokens, dim, dtype):
        if part.of in bounds:
            begin, end, count = (np.asarray(x) for x in part.touched(*bounds[part.of]))
            for i in range(count.max()):
                at, _ = part.place(i, begin)
                fetched = sum(min(tpu.HALF, part.block - x) * (end > at + x) for x in range(0, part.block, tpu.HALF))
                padded = dim if part.lanes else -(-dim // tpu.LANES) * tpu.LANES
                moved += 2 * np.sum(fetched * (i < count) * alive.sum(axis=1)[:, None]) * padded * dtype.itemsize
    return fewest, int(moved)


def rows(platform: str, time: Callable) -> Iterator[dict]:
    """Measures the real cases, cut to 4 layers. time(function, *arguments) -> seconds."""
    for name, case in cases.REAL.items():
        if platform == "cpu" and not name.startswith("SmolLM2"):
            continue
        case = four_layers(case)
        yield {
            "operation": "ragged_prefill",
            "shape": name,
            "seconds": time(lambda arguments: ragged_prefill(**arguments), cases.arrays(case)),
            "flops": flops(case),
            "bytes": traffic(case, "h100")[0],
        }
