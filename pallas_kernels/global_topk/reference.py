"""The meaning of global_topk, simple and not fast, and the checks on its arguments.

A row of N = C + S*W entries: C pool slots, of which stream s owns starts[s]..starts[s+1], then the write buffer, [S, W] flattened.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LOWEST, HIGHEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max
INFINITY = 0x7F800000  # the bits of float32's


class Selection(NamedTuple):
    """What is kept of B rows, and where it goes."""

    keep: jax.Array  # [B, N] bool
    counts: jax.Array  # [B, S] int32, kept entries of each stream
    destinations: jax.Array  # [B, N] int32, the slot a kept entry goes to; C for what is dropped


class TopK(NamedTuple):
    """A Selection, and whether a valid score was NaN."""

    keep: jax.Array
    counts: jax.Array
    destinations: jax.Array
    has_nan: jax.Array  # [B] bool


def ordered_keys(score: jax.Array, valid: jax.Array, protected: jax.Array) -> jax.Array:
    """int32 keys that sort as the float32 scores do: -0.0 as +0.0, NaN as -inf; what is not valid below them all, what is protected above."""
    # In integers throughout: accelerators compare denormals as zeros.
    bits = jax.lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32)
    magnitude = bits & HIGHEST
    keys = jnp.where((bits < 0) | (magnitude > INFINITY), -jnp.minimum(magnitude, INFINITY), magnitude)
    return jnp.where(valid, jnp.where(protected, HIGHEST, keys), LOWEST)


def top_k_mask(keys: jax.Array, k: jax.Array) -> jax.Array:
    """The k largest of keys [..., N] int32 as a mask; k [...] int32. Exactly k, or all above LOWEST if those are fewer; ties in slot order.

    The k-th largest key is found bit by bit, by counting: 32 sweeps and no sort.
    """

    def refine(i, threshold):
        candidate = threshold + jnp.left_shift(jnp.int32(1), 31 - i)
        enough = jnp.sum(keys >= candidate[..., None], axis=-1, dtype=jnp.int32) >= k
        return jnp.where(enough, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 32, refine, jnp.full(keys.shape[:-1], LOWEST, jnp.int32))[..., None]
    above = keys > threshold
    tied = (keys == threshold) & (keys > LOWEST)
    quota = k[..., None] - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= quota))


def select_keys(keys: jax.Array, k: jax.Array, starts: jax.Array, width: int) -> Selection:
    """global_topk on keys [B, N] int32 that say it all: LOWEST for what is not valid, HIGHEST for what is protected; the largest stay."""
    entries, streams = keys.shape[1], starts.shape[1] - 1
    slots = entries - streams * width
    keep = top_k_mask(keys, k)

    def place(keep, starts):
        pool = jnp.searchsorted(starts, jnp.arange(slots), side="right") - 1
        stream = jnp.concatenate([pool, jnp.repeat(jnp.arange(streams), width)])
        # Stable: inside a stream, entries stay in the order of their index.
        order = jnp.argsort(jnp.where(keep, stream, streams), stable=True)
        rank = jnp.zeros(entries, jnp.int32).at[order].set(jnp.arange(entries, dtype=jnp.int32))
        counts = jnp.zeros(streams, jnp.int32).at[jnp.where(keep, stream, streams)].add(1, mode="drop")
        return counts, jnp.where(keep, rank, slots)

    return Selection(keep, *jax.vmap(place)(keep, starts))


def check(scores, valid, protected, k, starts, width) -> None:
    """Raises ValueError for arguments that global_topk does not take, naming the argument."""
    _expect("scores", scores, "float32", ("B", "N"), least=1)
    _expect("valid", valid, "bool", scores.shape)
    _expect("protected", protected, "bool", scores.shape)
    _check_rest(scores.shape, k, starts, width)


def check_keys(keys, k, starts, width) -> None:
    """Raises ValueError for arguments that select_keys does not take, naming the argument."""
    _expect("keys", keys, "int32", ("B", "N"), least=1)
    _check_rest(keys.shape, k, starts, width)


def _expect(name, value, dtype, shape, least=0):
    """shape: numbers, and letters for what may be anything from `least` on."""
    got = getattr(value, "shape", None)
    if got is None or len(got) != len(shape) or any(n < least if isinstance(m, str) else n != m for n, m in zip(got, shape, strict=True)):
        takes = f"[{', '.join(map(str, shape))}]" + (f", letters at least {least}" if least else "")
        raise ValueError(f"{name}: got {type(value).__name__ if got is None else f'shape {got}'}, takes an array {takes}")
    if value.dtype != dtype:
        raise ValueError(f"{name}: got {value.dtype}, takes {dtype}")


def _check_rest(shape, k, starts, width):
    batch, entries = shape
    _expect("k", k, "int32", (batch,))
    _expect("starts", starts, "int32", (batch, "S+1"), least=2)
    streams = starts.shape[1] - 1
    if not isinstance(width, int) or not 0 <= width * streams <= entries:
        raise ValueError(f"width: got {width!r}, takes an int from 0 to {entries // streams}, the buffer entries of each of {streams} streams")
    slots = entries - streams * width
    # What is being traced has no values yet: there a k below 0 keeps nothing, and one above N all that is valid.
    if not isinstance(k, jax.core.Tracer):
        values = np.asarray(k)
        if values.min() < 0 or values.max() > entries:
            raise ValueError(f"k: got {values.tolist()}, takes 0 to N = {entries} of each row")
    if not isinstance(starts, jax.core.Tracer):
        values = np.asarray(starts)
        if (values[:, 0] != 0).any() or (np.diff(values) < 0).any() or values.max() > slots:
            row = values[(values[:, 0] != 0) | (np.diff(values) < 0).any(1) | (values.max(1) > slots)][0]
            raise ValueError(f"starts: got {row.tolist()}, takes rows that begin with 0 and rise to at most C = N - S*W = {slots}")
