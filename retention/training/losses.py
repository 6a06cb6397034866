"""What the gates are trained on: KL to the full-cache teacher, next-token loss, and the capacity of the budget. METHOD section 3."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from retention.training.sharding import BATCH

# Tokens whose logits exist at a time: enough to read the head's matrix at the speed of the products, and no more.
_BLOCK = 256


def capacity_loss(mass: jax.Array, positions: jax.Array, inside: jax.Array, budget: jax.Array, one_pool: bool) -> jax.Array:
    """How far the retained mass exceeds the budget, relative to the most it could, averaged over the times that exceed it; 0 if none does.

    c_t = max(0, (sum_s S_t - M n) / max((p_t+1) n - M n, 1)), n streams competing together; the mean over c > 0.

    Args:
      mass: [L,B,T,H] retained mass S_t. positions: [B,T], p_t within the document. inside: [B,T] bool; other times do not count.
      budget: scalar M, tokens per stream. one_pool: all streams compete (n = L*H); else each has its own budget (n = 1).
    """
    pools = mass.sum(axis=(0, 3), keepdims=True) if one_pool else mass
    n = mass.size // pools.size
    positions, inside = positions[..., None], inside[..., None]
    excess = (pools - budget * n) / jnp.maximum((positions + 1 - budget) * n, 1.0)
    excess = jnp.where(inside, jnp.maximum(excess, 0.0), 0.0)
    exceeding = jnp.sum(excess > 0, axis=(2, 3)).astype(jnp.float32)  # of a row: those of all rows may be more than an int32 counts
    return excess.sum() / jnp.maximum(exceeding.sum(), 1)


def weighted_losses(
    mesh: Mesh,
    tied: bool,
    hidden: jax.Array,
    teacher: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    kl_weight: jax.Array,
    ntp_weight: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """KL(teacher || student) over the full vocabulary at temperature 1, and cross-entropy with the labels, from hidden states.

    Only tokens that have a weight are computed, a block at a time: logits, losses and the gradient of `hidden` together, so that no [T, V] array exists and
    nothing is computed twice. Differentiable once, in reverse, by `hidden` alone, through the sum.

    Args:
      hidden, teacher: [B,T,E] hidden states after the final norm, of the student and of the teacher. head: [V,E] if `tied`, else [E,V].
      labels: [B,T] int. kl_weight, ntp_weight: [B,T] float32, what a token's two losses count in the sum.

    Returns:
      sum of kl_weight KL + ntp_weight CE, float32; and the two losses [B,T] float32, in nats, 0 for tokens without a weight.
    """
    local = functools.partial(_local_losses, tied)
    columns = P("tensor", None) if tied else P(None, "tensor")
    specs = (BATCH, BATCH, columns, BATCH, BATCH, BATCH)
    over_devices = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(BATCH, BATCH, BATCH), check_vma=False)

    @jax.custom_vjp
    def losses(hidden, teacher, head, labels, kl_weight, ntp_weight):
        return forward(hidden, teacher, head, labels, kl_weight, ntp_weight)[0]

    def forward(*inputs):
        kl, ntp, gradient = over_devices(*inputs)
        return (jnp.sum(inputs[4] * kl + inputs[5] * ntp), (kl, ntp)), gradient

    def backward(gradient, cotangents):
        return (cotangents[0] * gradient).astype(gradient.dtype), None, None, None, None, None

    losses.defvjp(forward, backward)
    return losses(hidden, teacher, head, labels, kl_weight, ntp_weight)


def _local_losses(tied, hidden, teacher, head, labels, kl_weight, ntp_weight):
    """What one device does for its rows and tokens, with its part of the vocabulary: KL, cross-entropy, and the gradient of their weighted sum."""
    shape, embed = hidden.shape[:2], hidden.shape[2]
    columns = head.shape[0 if tied else 1]
    hidden, teacher = hidden.reshape(-1, embed), teacher.reshape(-1, embed)
    labels, kl_weight, ntp_weight = labels.reshape(-1), kl_weight.reshape(-1), ntp_weight.reshape(-1)
    size = len(labels)
    block = min(_BLOCK, size)
    compared = (kl_weight != 0) | (ntp_weight != 0)
    # The last block is filled up with an index that no array holds: what is computed there is dropped.
    order = jnp.nonzero(compared, size=-(-size // block) * block, fill_value=size)[0]
    column = jax.lax.axis_index("tensor") * columns + jnp.arange(columns)

    def product(x, weights, over_columns):
        axis = (1 if tied else 0) if not over_columns else (0 if tied else 1)
        return jax.lax.dot_general(x, weights, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)

    def step(i, results):
        at = jax.lax.dynamic_slice(order, (i * block,), (block,))
        x, other, label, for_kl, for_ntp = (jnp.take(x, at, axis=0, mode="clip") for x in (hidden, teacher, labels, kl_weight, ntp_weight))
        # [2 block, columns], student and teacher behind each other, so that the matrix is read once and few sums cross devices
        logits = product(jnp.concatenate([x, other]), head, over_columns=False)
        logits -= jax.lax.pmax(logits.max(axis=1, keepdims=True), "tensor")
        logits -= jnp.log(jax.lax.psum(jnp.exp(logits).sum(axis=1, keepdims=True), "tensor"))
        student, full = logits[:block], logits[block:]
        own = column == label[:, None]
        wanted, for_kl, for_ntp = jnp.exp(full), for_kl[:, None], for_ntp[:, None]
        dlogits = (for_kl + for_ntp) * jnp.exp(student) - for_kl * wanted - jnp.where(own, for_ntp, 0.0)
        kl, ntp = jnp.sum(wanted * (full - student), axis=1), -jnp.sum(jnp.where(own, student, 0.0), axis=1)
        sums = jnp.concatenate([product(dlogits.astype(head.dtype), head, over_columns=True), kl[:, None], ntp[:, None]], axis=1)
        sums = jax.lax.psum(sums, "tensor")
        found = sums[:, -2], sums[:, -1], sums[:, :-2]
        return tuple(all_.at[at].set(new.astype(all_.dtype), mode="drop") for all_, new in zip(results, found, strict=True))

    start = jnp.zeros(size), jnp.zeros(size), jnp.zeros_like(hidden)
    kl, ntp, gradient = jax.lax.fori_loop(0, -(-jnp.sum(compared) // block), step, start)
    return kl.reshape(shape), ntp.reshape(shape), gradient.reshape(*shape, embed)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of values where mask holds, 0 where it holds nowhere."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
