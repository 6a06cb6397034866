"""What holds of pool and write buffer as arguments, whichever operation reads them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

LANES = 128  # of a TPU


def check(axes: str, q, k, v, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer, **counts) -> None:
    """Raises ValueError naming the first argument that does not fit, what it is and what would fit. Values are looked at where they are known.

    axes: those of q, as the message gives them: [B,..,H,G,D]. k and v have them without G. counts: further arguments by name, int32 [B], each with the most
    that it may hold.
    """
    if q.ndim != axes.count(",") + 1 or pool_keys.ndim != 3 or buffer_keys.ndim != 5:
        shapes = f"{q.shape}, {pool_keys.shape}, {buffer_keys.shape}"
        raise ValueError(f"q {axes}, pool_keys [B,C,D] and buffer_keys [L,B,H,W,D] have the shapes {shapes}")
    batch, heads, dim = q.shape[0], q.shape[-3], q.shape[-1]
    layers, slots, width = buffer_keys.shape[0], pool_keys.shape[1], buffer_keys.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"q is {q.dtype}: bfloat16 and float32 work")
    if width == 0:
        raise ValueError(f"buffer_keys has the shape {buffer_keys.shape}: a write buffer holds at least one token")
    own, pool, buffer = (*q.shape[:-2], dim), (batch, slots, dim), (layers, batch, heads, width, dim)
    entries = {
        "k": (k, own),
        "v": (v, own),
        "pool_keys": (pool_keys, pool),
        "pool_values": (pool_values, pool),
        "buffer_keys": (buffer_keys, buffer),
        "buffer_values": (buffer_values, buffer),
    }
    integers = {name: (array, (batch,), most) for name, (array, most) in counts.items()} | {
        "starts": (starts, (batch, layers * heads + 1), slots),
        "buffered": (buffered, (batch,), width),
        "layer": (layer, (), layers - 1),
    }
    for name, (array, shape) in entries.items():
        if array.shape != shape or array.dtype != q.dtype:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}: with this q, pool and buffer it must be {q.dtype}{list(shape)}")
    for name, (array, shape, highest) in integers.items():
        if jnp.shape(array) != shape or jnp.result_type(array) != jnp.int32:
            raise ValueError(f"{name} is {jnp.result_type(array)}{list(jnp.shape(array))}: it must be int32{list(shape)}")
        if not isinstance(array, jax.core.Tracer) and np.size(array) and not (0 <= np.min(array) and np.max(array) <= highest):
            raise ValueError(f"{name} lies in {np.min(array)}..{np.max(array)}: it must lie in 0..{highest}")
    if not isinstance(starts, jax.core.Tracer) and np.any(np.diff(starts) < 0):
        raise ValueError("starts falls along a row: segments lie end to end, so that each row must be sorted")


def check_gpu(dim: int) -> None:
    """Raises NotImplementedError for a head dimension with which the GPU's ragged_decode cannot work."""
    if dim & (dim - 1) or dim < 16:
        raise NotImplementedError(f"q has the head dimension {dim}: on a GPU powers of 2 from 16 work")


def along_lanes(entries: int, dim: int) -> bool:
    """Whether XLA lays out [.., entries, D] on a TPU with the entries along lanes: where D would leave lanes empty. Any other way would cost a copy."""
    return pl.cdiv(entries, LANES) * LANES * dim < pl.cdiv(entries, 8) * 8 * pl.cdiv(dim, LANES) * LANES
