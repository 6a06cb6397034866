"""global_topk over entries that stay on the devices of their streams, for use inside jax.shard_map (check_vma=False: it calls Pallas kernels)."""

import jax
import jax.numpy as jnp

from pallas_kernels.global_topk import select_keys
from pallas_kernels.global_topk.reference import LOWEST, Selection

BITS = 4  # of the threshold that one round finds: 32 // BITS sums over the devices of [B, 2**BITS - 1] counts


def sharded_topk(keys: jax.Array, k: jax.Array, starts: jax.Array, width: int, axis_name) -> Selection:
    """This device's part of the k largest keys of all devices along axis_name.

    What stays is what select_keys keeps of the devices' rows laid end to end in the order of the axis: of those that tie the first device's stay
    first, in their order, then the second's. counts and destinations are about this device's streams and its own pool of C slots; more than C
    entries run past that pool's end.

    Args:
      keys: [B, n] int32, this device's entries: pool and buffer of its own streams. n is the same on all devices: shorter rows are padded with
        reference.LOWEST.
      k: [B] int32, the total over all devices, the same on all.
      starts: [B, S+1] int32, its own streams' segments of its own pool.
      width: W.
    """

    def find(i, state):
        threshold, above = state
        shift = 32 - BITS * (i + 1)
        candidates = [threshold + jnp.left_shift(jnp.int32(value), shift) for value in range(1, 2**BITS)]
        counts = jnp.stack([_count(keys >= candidate[:, None]) for candidate in candidates], axis=1)
        counts = jax.lax.psum(counts, axis_name)
        enough = counts >= k[:, None]
        above = jnp.maximum(above, jnp.max(jnp.where(enough, 0, counts), axis=1))
        return threshold + jnp.left_shift(jnp.sum(enough, axis=1, dtype=jnp.int32), shift), above

    threshold, above = jax.lax.fori_loop(0, 32 // BITS, find, (jnp.full_like(k, LOWEST), jnp.zeros_like(k)))
    # Entries tied at the threshold, on all devices: [devices, B]
    tied = jax.lax.all_gather(_count((keys == threshold[:, None]) & (keys > LOWEST)), axis_name)
    device = jax.lax.axis_index(axis_name)
    earlier = jnp.sum(jnp.where(jnp.arange(tied.shape[0])[:, None] < device, tied, 0), axis=0)
    share = _count(keys > threshold[:, None]) + jnp.clip(k - above - earlier, 0, tied[device])
    # With how many it keeps known, a device's part is its own top-k.
    return select_keys(keys, share, starts, width)


def _count(mask):
    return jnp.sum(mask, axis=1, dtype=jnp.int32)
