"""What global_topk moves and how long it takes."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.global_topk import cases, gpu, reference, select_keys, tpu

CHIPS = {
    "v4": pltpu.ChipVersion.TPU_V4,
    "v5e": pltpu.ChipVersion.TPU_V5E,
    "v5p": pltpu.ChipVersion.TPU_V5P,
    "v6e": pltpu.ChipVersion.TPU_V6E,
    "tpu7x": pltpu.ChipVersion.TPU_7X,
}


def _digit_bits(case: cases.Case, target: str) -> int:
    vmem = pltpu.get_tpu_info_for_chip(CHIPS[target], 1).vmem_capacity_bytes
    return tpu.digit_bits(tpu.row_count(case.entries), case.streams, tpu.usable(vmem))


def sweeps(case: cases.Case, target: str) -> int:
    """How often the kernels read the keys of a row."""
    if target == "h100":
        return len(gpu.ROUNDS) + 2
    bits = _digit_bits(case, target)
    return 1 if bits == 32 else 32 // bits + 1


def fewest(case: cases.Case) -> int:
    """The bytes that select_keys must move: keys in, keep and destinations out."""
    return case.batch * case.entries * (4 + 1 + 4)


def traffic(case: cases.Case, target: str) -> tuple[int, int]:
    """(fewest, moved): the bytes that must move between HBM and chip, and those that the kernels of select_keys do move.

    On a GPU moved counts what its level-2 cache serves: up to 10M keys, all that is read after the first round. On a TPU it is without the copies
    that XLA makes from [B, N] to rows of 128 and back where B > 1 or N is no multiple of 1,024.
    """
    entries, bounds = case.entries, 2 * case.streams + 2
    if target == "h100":
        programs, blocks = gpu.round_programs(entries), pl.cdiv(entries, gpu.block_size(entries))
        partial = programs * gpu.VALUES  # counts that a round writes, and that each program of the next reads
        words = sweeps(case, target) * entries + len(gpu.ROUNDS) * partial + ((len(gpu.ROUNDS) - 1) * programs + blocks) * partial
        words += bounds * (gpu.block_size(entries) + blocks) + blocks * blocks + entries * (1 + 1 / 4)
        return fewest(case), round(4 * case.batch * words)
    rows, bits = tpu.row_count(entries), _digit_bits(case, target)
    if bits == 32:
        moved = rows * (1 + 1 + 1 / 4) + bounds / tpu.LANES
    else:
        # A sweep reads again where its last chunk overlaps the one before. Ranks are written and read before the results are.
        chunk = tpu.search_scratch(rows, bits)[1][0][1]
        moved = 32 // bits * pl.cdiv(rows, chunk) * chunk + 2 * rows + rows * (1 + 1 + 1 / 4)
    return fewest(case), round(4 * tpu.LANES * case.batch * moved)


def rows(platform: str, time: Callable) -> Iterator[dict]:
    """Measures select_keys, and jax.lax.top_k on the scores behind its keys. time(function, *arguments) -> seconds; platform: "cpu", "gpu", "tpu"."""
    for name in ["qwen3_m512", "1m"] if platform == "cpu" else cases.REAL:
        case = cases.REAL[name]
        arguments = cases.arrays(case)
        scores, valid = arguments["scores"], arguments["valid"]
        keys = reference.ordered_keys(scores, valid, jnp.zeros_like(valid))
        k = int(arguments["k"].max())
        yield {
            "operation": "global_topk",
            "shape": f"{name}: B={case.batch} N={case.entries} S={case.streams} k={k}",
            "seconds": time(lambda *a, width=case.width: select_keys(*a, width), keys, arguments["k"], arguments["starts"]),
            "bytes": fewest(case),
            "rivals": {"jax.lax.top_k": time(lambda scores, k=k: jax.lax.top_k(scores, k), jnp.where(valid, scores, -jnp.inf))},
        }
