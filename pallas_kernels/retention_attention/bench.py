"""What retention_attention moves and how long it takes, forward and backward."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.retention_attention import cases, gpu, retention_attention, tpu
from pallas_kernels.retention_attention.common import document_bounds


def flops(case: cases.Case) -> int:
    """Of forward and backward as they are usually counted: 2 and 5 products of a causal triangle. (The kernels do 2 and 7, to keep nothing T x T.)"""
    return 7 * case.batch * case.heads * case.group * case.length**2 * case.dim


def met(case: cases.Case, target: str) -> dict[str, int]:
    """How many keys the query blocks of the forward and the dq kernel fetch, and queries the key blocks of the other, over the batch."""
    ids = cases.segment_ids(case)
    ids = None if ids is None else jnp.asarray(ids)
    if target == "h100":
        length = pl.cdiv(case.length, gpu.PADDING) * gpu.PADDING
        bounds = document_bounds(ids, case.batch, case.length, length)
        found = {}
        for name, (rows, keys, *_) in gpu.tiles(case.group, case.dim, jnp.dtype(case.dtype)).items():
            tokens = rows // case.group
            own, other = (keys, tokens) if name == "keys" else (tokens, keys)
            begin = np.arange(0, length, own)
            end = np.minimum(begin + own, length)
            seen = [
                gpu.queries_seeing(begin, keys, last, length, tokens) if name == "keys" else gpu.keys_seen(begin, end, first, keys, length)
                for first, last in zip(*map(np.asarray, bounds), strict=True)
            ]
            found[name] = sum(int(np.sum(high - low)) for low, _, _, high in seen) * other
        return found
    length, queries, keys = tpu.blocks(case.length, case.group, case.dim, case.dtype)
    first, last = document_bounds(ids, case.batch, case.length, length)

    def fetched(words, steps, most):
        """Blocks met, of each sequence one and another wherever it changes."""
        blocks = np.asarray(tpu.other(words)).reshape(case.batch, most)[:, :steps]
        return case.batch + int(np.sum(blocks[:, 1:] != blocks[:, :-1]))

    by_queries = fetched(*tpu.queries_schedule(first, length, queries, keys)) * keys
    return {"forward": by_queries, "queries": by_queries, "keys": fetched(*tpu.keys_schedule(last, length, queries, keys)) * queries}


def traffic(case: cases.Case, target: str) -> tuple[int, int]:
    """(fewest, moved): the bytes of q, k, v, out and their gradients that forward and backward must move, and those that the kernels' blocks do.

    Keys are fetched again for each block of queries that sees them: on a GPU from its level-2 cache for the most part. Without the numbers that go with
    each token, 1/D of it all, and on a TPU without the copies of q, k, v, out in the kernel's order of axes, which XLA makes unless it can use them so.
    """
    token = case.heads * case.dim * jnp.dtype(case.dtype).itemsize  # bytes of a token's k or v
    tokens = case.batch * case.length
    # Forward q, k, v -> out; backward q, k, v, out, dout -> dq, dk, dv.
    fewest = tokens * (6 * case.group + 6)
    again = met(case, target)
    # The blocks that stay: q, out; out, dout for delta; q, dout, dq; k, v, dk, dv.
    moved = tokens * (7 * case.group + 4) + 2 * (again["forward"] + again["queries"] + again["keys"] * case.group)
    return fewest * token, moved * token


def gradients(attention: Callable) -> Callable:
    """(inputs, cotangents) -> the gradients of attention(*inputs)."""

    def pull(inputs, cotangents):
        return jax.vjp(attention, *inputs)[1](cotangents)

    return pull


def rows(platform: str, time: Callable) -> Iterator[dict]:
    """Forward and backward, and forward alone, beside plain causal attention: cuDNN's on a GPU, XLA's elsewhere, up to the T that it has memory for.

    time(function, *arguments) -> seconds.
    """
    case = cases.Case(1, 1024, 3, 3, 64) if platform == "cpu" else cases.REAL["Qwen3-4B T=32K"]
    case = dataclasses.replace(case, documents=None)
    for length in [1024, 4096] if platform == "cpu" else [4096, 8192, 16_384, 32_768]:
        case = dataclasses.replace(case, length=length)
        given = cases.arrays(case)
        inputs = tuple(given[name] for name in ("q", "k", "v", "log_beta"))
        cotangents = (inputs[0], inputs[3])
        row = {"operation": "retention_attention", "shape": f"B=1 T={length} H={case.heads} G={case.group} D={case.dim} {case.dtype}"}

        def rival(q, k, v):
            flat = q.reshape(*q.shape[:2], -1, q.shape[-1])
            out = jax.nn.dot_product_attention(flat, k, v, is_causal=True, implementation="cudnn" if platform == "gpu" else "xla")
            return out.reshape(q.shape)

        fits = platform == "gpu" or length <= 4096
        name = "cudnn without bias" if platform == "gpu" else "XLA without bias"
        yield row | {
            "shape": f"{row['shape']}, forward",
            "seconds": time(retention_attention, *inputs),
            "flops": flops(case) * 2 // 7,
            "rivals": {name: time(rival, *inputs[:3])} if fits else {},
        }
        yield row | {
            "shape": f"{row['shape']}, forward and backward",
            "seconds": time(gradients(retention_attention), inputs, cotangents),
            "flops": flops(case),
            "rivals": {name: time(gradients(rival), inputs[:3], cotangents[0])} if fits else {},
        }
