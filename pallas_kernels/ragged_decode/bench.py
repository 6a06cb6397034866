"""What ragged_decode moves and how long it takes."""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from pallas_kernels.cached_cases import four_layers, starts
from pallas_kernels.ragged_decode import cases, gpu, ragged_decode, tpu


def _bounds(case: cases.Case) -> tuple[np.ndarray, np.ndarray]:
    """The layer's first slot and the end of its last, [B] each."""
    first = case.layer * case.heads
    return starts(case)[:, first], starts(case)[:, first + case.heads]


def traffic(case: cases.Case, target: str) -> tuple[int, int]:
    """(fewest, moved): the bytes that must move, each entry that is kept once, and those that the kernel moves."""
    batch, rows, itemsize = len(case.buffered), case.heads * case.group, jnp.dtype(case.dtype).itemsize
    (begin, end), buffered = _bounds(case), np.array(case.buffered)
    entries = (end - begin) + case.heads * buffered
    row = case.dim * itemsize
    fewest = row * (2 * int(entries.sum()) + batch * (2 * rows + 2 * case.heads))
    if target == "h100":
        # Masked loads bring what is asked for. Each share that saw something of a head writes and reads its partial result, in float32.
        block = gpu.block_size(case.dim, itemsize)
        shares = gpu.most_shares(batch, -(-case.slots // case.layers) + case.heads * case.width, block)
        partial = 0
        for count, first in zip(entries, range(batch), strict=True):
            size = int(gpu.share_size(int(count), batch, shares, block))
            # A share's heads: the borders between segments that lie inside it, and one more; the buffer's are counted as all of them at worst.
            used = -(-int(count) // size)
            heads = used + case.heads - 1 + min(used, case.heads) * (case.buffered[first] > 0)
            partial += heads * case.group * (case.dim + 2)
        return fewest, fewest + 2 * 4 * partial
    moved = batch * rows * row * 4
    for source in tpu.sources(case.heads, case.dim, itemsize, case.slots, case.width):
        heads = source.heads or 1
        for b in range(batch):
            low, high = (int(begin[b]), int(end[b])) if source.heads is None else (0, int(buffered[b]))
            if high > low:
                aligned = low // source.tile * source.tile
                moved += 2 * row * heads * (-(-(high - aligned) // source.tile) * source.tile)
    return fewest, moved


def rows(platform: str, time: Callable) -> Iterator[dict]:
    """Measures the real cases, cut to 4 layers. time(function, *arguments) -> seconds."""
    for name, case in cases.REAL.items():
        if platform == "cpu" and not name.startswith("SmolLM2"):
            continue
        case = four_layers(case)
        yield {
            "operation": "ragged_decode",
            "shape": name,
            "seconds": time(lambda arguments: ragged_decode(**arguments), cases.arrays(case)),
            "bytes": traffic(case, "h100")[0],
        }
