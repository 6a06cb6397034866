"""One gate-training step, on any mesh: frozen teacher and student share one copy of the weights; only the gates learn.

make_step's result is a pure function: jit it, with the state donated, in whatever loop there is.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.retention_attention.reference import last_of_document
from retention import gates as gates_lib
from retention.attention import retention_attention
from retention.model import Config, bind
from retention.names import is_positive
from retention.training import sharding
from retention.training.losses import capacity_loss, masked_mean, weighted_losses


class TrainState(NamedTuple):
    """step: int32 scalar; params: the gates; optimizer: optax state."""

    step: jax.Array
    params: dict
    optimizer: optax.OptState


def make_optimizer(config, steps: int) -> optax.GradientTransformation:
    """AdamW, warm-up and cosine over `steps`, from a config's `optimizer` section. The readout's bias does not decay: it sets the level.

    Raises ValueError for steps that the warm-up would use up, and for numbers that it cannot use.
    """
    for name in ("clip_norm", "eps"):
        if not is_positive(config[name]):
            raise ValueError(f"optimizer.{name} must be a number above 0, not {config[name]}")
    for name in ("learning_rate", "final_fraction", "weight_decay"):
        if not 0 <= config[name] < math.inf:
            raise ValueError(f"optimizer.{name} must be a number of at least 0, not {config[name]}")
    for name in ("b1", "b2"):
        if not 0 <= config[name] < 1:
            raise ValueError(f"optimizer.{name} must be at least 0 and below 1, not {config[name]}")
    if steps <= config.warmup_steps:
        raise ValueError(f"steps must be more than optimizer.warmup_steps, {config.warmup_steps}, not {steps}")
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, steps, config.learning_rate * config.final_fraction
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: {name: name != "bias" for name in params},
        ),
    )


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def attention_over(mesh: Mesh):
    """retention_attention(q, k, v, log_beta, segment_ids) on global arrays: rows, heads and tokens split as the mesh says.

    With a context axis of n devices the tokens are those of `dealt`. Each device gathers keys, values, log beta and documents of its rows, and runs its two
    slices of queries against all; its part in their gradients goes back as a reduce-scatter.
    """
    n = mesh.shape["context"]

    def gathered(x):
        """[b, 2c, ...] dealt -> [b, T, ...] in time's order"""
        pieces = jax.lax.all_gather(x, "context", axis=1).reshape(x.shape[0], n, 2, -1, *x.shape[2:])
        return jnp.concatenate([pieces[:, :, 0], pieces[:, ::-1, 1]], axis=1).reshape(x.shape[0], -1, *x.shape[2:])

    def local(q, k, v, log_beta, segment_ids):
        if n == 1:
            return retention_attention(q, k, v, log_beta, segment_ids)
        everything = jax.tree.map(gathered, (k, v, log_beta, segment_ids))
        size, index = q.shape[1] // 2, jax.lax.axis_index("context")
        early = retention_attention(q[:, :size], *everything, start=index * size)
        late = retention_attention(q[:, size:], *everything, start=(2 * n - 1 - index) * size)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), early, late)

    heads = P(*sharding.BATCH, "tensor")
    specs = (heads, heads, heads, heads, sharding.BATCH)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(heads, heads), check_vma=False)


def dealt(mesh: Mesh, x: jax.Array) -> jax.Array:
    """x [B,T] in time's order -> its tokens as the devices of the context axis have them, piece i and piece 2n-1-i of 2n on device i.

    Causal attention costs in proportion to the position, so that each has the same to do.
    """
    n = mesh.shape["context"]
    if n > 1:
        pieces = x.reshape(x.shape[0], 2 * n, -1)
        x = pieces[:, jnp.array([piece for i in range(n) for piece in (i, 2 * n - 1 - i)])].reshape(x.shape)
    return sharding.by_token(mesh, x)


def _run(config: Config, mesh: Mesh, params: dict, batch: dict, y, log_beta=None, layers=None, remat=False):
    """Hidden states [B,T,E] of a dealt batch, and y(h, log_beta, mass) of each layer. log_beta: of (the layer's slice of `layers`, h); None: full cache."""
    attention = attention_over(mesh)

    def place(x, layer):
        return sharding.by_token(mesh, x), sharding.used(mesh, layer)

    def attend(carry, layer, q, k, v, h):
        beta = None if log_beta is None else log_beta(layer, h)
        out, mass = attention(q, k, v, beta, batch["segment_ids"])
        return carry, out, y(h, beta, mass)

    hidden, _, ys = bind(config, params)(batch["tokens"], batch["positions"], attend, layer_inputs=layers, remat=remat, place=place)
    return sharding.by_token(mesh, hidden), ys


def _gather_outer(mesh: Mesh, params: dict) -> dict:
    """Embedding, head and last norm gathered for use; the layers' weights are, each when it runs."""
    return sharding.used(mesh, {name: leaf for name, leaf in params.items() if name != "layers"}) | {"layers": params["layers"]}


@functools.partial(jax.jit, static_argnums=(0, 1))
def gate_input_rms(config: Config, mesh: Mesh, params: dict, batch: dict) -> jax.Array:
    """[L] float32: root mean square of each layer's gate input over the tokens of a batch, for `gates.init`."""
    batch = {name: dealt(mesh, batch[name]) for name in ("tokens", "positions", "segment_ids")}
    inside = batch["segment_ids"] > 0

    def rms(h, log_beta, mass):
        return jnp.sqrt(masked_mean(jnp.square(h.astype(jnp.float32)).mean(-1), inside))

    return _run(config, mesh, _gather_outer(mesh, params), batch, rms)[1]


def kept_share(log_beta: jax.Array, distance: jax.Array, inside: jax.Array, count: jax.Array, one_pool: bool) -> jax.Array:
    """[L,H] float32: the share of each stream's tokens among the `count` entries that rank highest, over all streams or each by itself, at the end of their
    documents, which compete together.

    log_beta: [L,B,T,H]. distance: [B,T], from a token to the one that follows its document. inside: [B,T] bool, what counts. Ties all stay.
    """
    inside = inside[..., None]
    # The bits of a float32 >= 0 order as integers do: the count-th largest score is found a bit at a time, by counting.
    bits = jax.lax.bitcast_convert_type(jnp.abs(distance[..., None] * log_beta), jnp.int32)

    def narrow(i, limit):
        """limit: the largest known below which fewer than `count` entries lie."""
        higher = limit | (1 << (30 - i))
        # The entries of a batch of long rows are more than an int32 counts; those of one row and head are not.
        lower = jnp.sum(inside & (bits < higher), axis=2, keepdims=True).astype(jnp.float32)
        return jnp.where(jnp.sum(lower, axis=axes, keepdims=True) < count, higher, limit)

    axes = (0, 1, 2, 3) if one_pool else (1, 2)
    limit = jax.lax.fori_loop(0, 31, narrow, jnp.zeros_like(bits[:1, :1, :1, :1] if one_pool else bits[:, :1, :1]))
    return jnp.sum(inside & (bits <= limit), axis=(1, 2)) / jnp.maximum(jnp.sum(inside), 1)


def make_step(config: Config, gate: gates_lib.GateConfig, optimizer: optax.GradientTransformation, loss, mesh: Mesh):
    """Builds step(state, params, batch, key) -> (state, measurements), to be jitted with `state` donated.

    Args:
      loss: config section with budget_low and budget_high (M is drawn between them, log-uniformly, once a batch: tokens if budget_high is above 1, else
        shares of the batch's mean document length), kl, ntp, other_kl, capacity (weights), remat.
      mesh: of sharding.make_mesh. state lies as sharding.state_sharding says, params as params_sharding, batch as BATCH.

    batch: [B,T] arrays as retention.training.data makes them: tokens, labels, segment_ids, positions, answer, other.
    Loss = KL(answers) + NTP(answers) + KL(other tokens) + capacity, each a weighted mean of its own, so that few answer tokens are not drowned.
    A batch in which no token is compared, for there is none or its losses have no weight, changes no gate: capacity alone would only teach to forget.
    Its measurement `compared` is 0.

    measurements: float32 scalars; loss and its parts (other_kl is 0 where it has no weight, as it is not computed then), budget (M), retained_share (mean
    of S_t / (p_t+1)), gradient_norm, and the counts answers, others, compared, documents, tokens;
    retained_by_layer [L]; kept_share [L,H], the share of each stream's tokens that the budget keeps at the documents' ends.

    Raises ValueError for budgets that are no range above 0.
    """
    if not 0 < loss.budget_low <= loss.budget_high:
        raise ValueError(f"loss.budget_low must be above 0 and at most loss.budget_high, got {loss.budget_low} and {loss.budget_high}")

    def loss_fn(gate_params, params, batch, key):
        # How far each document's end is, while the tokens still are in time's order.
        distance = last_of_document(batch["segment_ids"], batch["tokens"].shape) - jnp.arange(batch["tokens"].shape[1]) + 1
        distance = dealt(mesh, distance)
        batch = {name: dealt(mesh, x) for name, x in batch.items()}
        params = _gather_outer(mesh, params)
        inside, positions = batch["segment_ids"] > 0, batch["positions"]
        tokens, documents = jnp.sum(inside), jnp.sum(inside & (positions == 0))
        log_low, log_high = jnp.log(loss.budget_low), jnp.log(loss.budget_high)
        budget = jnp.exp(jax.random.uniform(key, (), minval=log_low, maxval=log_high))
        if loss.budget_high <= 1:
            budget *= tokens / jnp.maximum(documents, 1)

        def log_beta(layer, h):
            # Sinks that inference will protect are kept here too, so that the student is the model that will be used.
            return jnp.where(positions[..., None] < gate.sinks, 0.0, gates_lib.log_beta(layer, h, config.kv_heads))

        teacher = jax.lax.stop_gradient(_run(config, mesh, params, batch, lambda h, log_beta, mass: None)[0])
        layers = gates_lib.per_layer(gate_params, config, gate)
        # log_beta, mass [L, B, T, H]
        hidden, (log_beta, mass) = _run(config, mesh, params, batch, lambda h, log_beta, mass: (log_beta, mass), log_beta, layers, loss.remat)
        answer, other = batch["answer"], batch["other"]
        answers, others = jnp.sum(answer), jnp.sum(other)
        per_answer, per_other = answer / jnp.maximum(answers, 1.0), other / jnp.maximum(others, 1.0)
        kl_weight, ntp_weight = loss.kl * per_answer + loss.other_kl * per_other, loss.ntp * per_answer
        compared = jnp.sum((kl_weight != 0) | (ntp_weight != 0))
        quality, (divergence, cross_entropy) = weighted_losses(
            mesh,
            config.tie_embeddings,
            hidden,
            teacher,
            params["embed" if config.tie_embeddings else "head"],
            batch["labels"],
            kl_weight,
            ntp_weight,
        )
        # Local gates compete each in its own stream, all others in one pool.
        one_pool = gate.kind != "local"
        capacity = capacity_loss(mass, positions, inside, budget, one_pool)
        total = jnp.where(compared > 0, quality + loss.capacity * capacity, 0.0)
        by_layer = jnp.sum(jnp.where(inside[..., None], mass / (positions + 1)[..., None], 0.0), axis=(1, 2, 3)) / jnp.maximum(tokens * config.kv_heads, 1)
        kept = kept_share(jax.lax.stop_gradient(log_beta), distance, inside, budget * documents * (config.streams if one_pool else 1), one_pool)
        return total, {
            "loss": total,
            "kl": masked_mean(divergence, answer),
            "ntp": masked_mean(cross_entropy, answer),
            "other_kl": masked_mean(divergence, other),
            "capacity": capacity,
            "budget": budget,
            "retained_share": by_layer.mean(),
            "answers": answers,
            "others": others,
            "compared": compared,
            "documents": documents,
            "tokens": tokens,
            "retained_by_layer": by_layer,
            "kept_share": kept,
        }

    def step(state: TrainState, params: dict, batch: dict, key: jax.Array):
        gradient, measurements = jax.grad(loss_fn, has_aux=True)(state.params, params, batch, jax.random.fold_in(key, state.step))
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        learned = optax.apply_updates(state.params, updates), optimizer_state
        taught = measurements["compared"] > 0
        params, optimizer_state = jax.tree.map(lambda new, old: jnp.where(taught, new, old), learned, (state.params, state.optimizer))
        measurements["gradient_norm"] = optax.tree.norm(gradient)
        return TrainState(state.step + 1, params, optimizer_state), jax.tree.map(lambda x: x.astype(jnp.float32), measurements)

    return step
