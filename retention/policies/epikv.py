"""EpiKV (arXiv 2606.26472): tokens at which the hidden state jumps in the middle layers and not in the late ones. One mask for all layers and heads.

Made for long generations, of which the prompt is kept: give its length as `sinks`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from retention.policies.base import Policy, Streams, Written, as_stored

WINDOW = 64  # values that a z-score looks back on
SEGMENT = 128
QUOTAS = (64, 32, 8)  # kept of a segment, by how much its keys vary


def surprise(hidden: jax.Array, position: jax.Array) -> jax.Array:
    """z-scores over the last 64 values, the token's own among them, of the mean over layers of ||h(t) - h(t-1)||.

    hidden [n, B, 64+T, E] with the tokens before, position [B, T] of the new ones -> [B, T] float32. The first token has no value; of one or two values
    no z says anything, and it is 0.
    """
    hidden = hidden.astype(jnp.float32)
    # Of tokens -63 to T-1. [B, 63+T]
    jump = jnp.linalg.norm(jnp.diff(hidden, axis=2), axis=-1).mean(axis=0)
    there = jnp.arange(jump.shape[1]) - (WINDOW - 1) + position[:, :1] > 0
    index = jnp.arange(position.shape[1])[:, None] + jnp.arange(WINDOW)
    # [B, T, 64]
    values, valid = jump[:, index], there[:, index]
    mean = jnp.mean(values, axis=-1, where=valid)
    deviation = jnp.std(values, axis=-1, where=valid)
    return jnp.where(valid.sum(axis=-1) > 2, (values[..., -1] - mean) / (deviation + 1e-6), 0.0)


def contrast(written: Written, early: int, weight: float) -> jax.Array:
    """weight * z of the first `early` layers - z of the others, the same for every stream: [L, B, T, H]."""
    z = weight * surprise(written.hidden[:early], written.position) - surprise(written.hidden[early:], written.position)
    layers, *_, heads = written.stream.shape
    return jnp.broadcast_to(z[None, :, :, None], (layers, *z.shape, heads))


def segment_score(streams: Streams) -> jax.Array:
    """-(rank in its segment by s) / quota: of any budget the segments get shares as 64 : 32 : 8, by tertiles of their keys' variance.

    A segment is 128 positions; the variance is over its entries, mean over channels. The paper does not say over which layers and heads: here each stream has
    tertiles of its own, and scope "shared" ranks by the mean.
    """

    def of_stream(s, position, live, keys):
        entries = s.shape[0]
        number = jnp.where(live, position // SEGMENT, jnp.iinfo(jnp.int32).max)
        segment = jnp.cumsum(jnp.diff(number, prepend=number[:1]) != 0)

        def total(x):
            return jax.ops.segment_sum(jnp.where(live.reshape(-1, *[1] * (x.ndim - 1)), x, 0), segment, entries)

        count = total(jnp.ones(entries))
        divisor = jnp.maximum(count, 1)[:, None]
        mean = total(keys) / divisor
        variance = jnp.where(count > 0, jnp.mean(total(jnp.square(keys - mean[segment])) / divisor, axis=-1), -jnp.inf)
        tertile = 3 * jnp.argsort(jnp.argsort(-variance)) // jnp.maximum(jnp.sum(count > 0), 1)
        quota = jnp.asarray(QUOTAS, jnp.float32)[jnp.clip(tertile, 0, 2)]
        order = jnp.lexsort((-s, segment))
        first = jnp.cumsum(count) - count
        rank = jnp.zeros(entries).at[order].set(jnp.arange(entries) - first[segment[order]])
        return -rank / quota[segment]

    return jax.vmap(jax.vmap(of_stream))(streams.stat, streams.position, streams.live, streams.keys.astype(jnp.float32))


def newest(budget):
    return jnp.minimum(128, budget // 4)


def flat(layers: int) -> tuple[int, ...]:
    return round(10 * layers / 32), round(21 * layers / 32)


def flat_stat(written: Written) -> jax.Array:
    return contrast(written, early=1, weight=1.0)


def bands(layers: int) -> tuple[range, range]:
    return tuple(range(round(first * layers / 32), round(last * layers / 32) + 1) for first, last in ((7, 13), (18, 25)))


def band(layers: int) -> tuple[int, ...]:
    early, late = bands(layers)
    return *early, *late


def band_stat(written: Written) -> jax.Array:
    return contrast(written, early=len(bands(written.stream.shape[0])[0]), weight=1.29)


SHARED = Policy(as_stored, flat_stat, window=newest, scope="shared", scopes=("shared",), hidden=flat, past=WINDOW)


def flat_policy() -> Policy:
    """s = z_A - z_B of two layers."""
    return SHARED


def band_policy() -> Policy:
    """s = 1.29 z(mean over a band of layers) - z(mean over a later one)."""
    return dataclasses.replace(SHARED, stat=band_stat, hidden=band)


def segment_policy() -> Policy:
    """The flat s, ranked within segments of 128 tokens, see `segment_score`."""
    return dataclasses.replace(SHARED, score=segment_score, streams=True)
