"""One gate-training step: frozen teacher and student share one copy of the weights; only the gates learn."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from retention import gates as gates_lib
from retention.attention import retention_attention
from retention.model import Config, bind, plain_attend
from retention.training.losses import capacity_loss, masked_mean, token_losses


class TrainState(NamedTuple):
    """step: int32 scalar; params: the gates; optimizer: optax state."""

    step: jax.Array
    params: dict
    optimizer: optax.OptState


def make_optimizer(config, steps: int) -> optax.GradientTransformation:
    """AdamW, warm-up and cosine over `steps`, from a config's `optimizer` section. The readout's bias does not decay: it sets the level.

    Raises ValueError for steps that the warm-up would use up.
    """
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


def gate_input_rms(config: Config, params: dict, tokens: jax.Array) -> jax.Array:
    """[L] float32: root mean square of each layer's gate input over tokens [B,T], for `gates.init`."""

    def attend(carry, layer_input, q, k, v, h):
        return carry, retention_attention(q, k, v)[0], jnp.sqrt(jnp.mean(jnp.square(h.astype(jnp.float32))))

    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return bind(config, params)(tokens, positions, attend)[2]


def make_step(config: Config, gate: gates_lib.GateConfig, optimizer: optax.GradientTransformation, loss):
    """Builds step(state, params, batch, key) -> (state, measurements), to be jitted with `state` donated.

    Args:
      loss: config section with budget_low and budget_high (M / document length is drawn between them, log-uniformly, once a batch), capacity_every
        (the capacity is taken at every n-th position, from a random offset), kl, ntp, other_kl, capacity (weights), remat.

    The batch is `retention.training.data`'s: tokens [B,T], length [B], targets [B,K] (positions whose next token is compared), answer, valid [B,K].
    Loss = KL(answers) + NTP(answers) + KL(other tokens) + capacity, each a mean of its own, so that the few answer tokens are not drowned.
    """

    def loss_fn(gate_params, params, batch, key):
        decoder = bind(config, params)
        tokens, targets = batch["tokens"], batch["targets"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        offset_key, budget_key = jax.random.split(key)
        log_low, log_high = jnp.log(loss.budget_low), jnp.log(loss.budget_high)
        budget = jnp.exp(jax.random.uniform(budget_key, (), minval=log_low, maxval=log_high)) * batch["length"].mean()
        times = jnp.arange(0, tokens.shape[1], loss.capacity_every) + jax.random.randint(offset_key, (), 0, loss.capacity_every)

        def gated_attend(carry, layer, q, k, v, h):
            log_beta = gates_lib.log_beta(layer, h, config.kv_heads)
            # Sinks that inference will protect are kept here too, so that the student is the model that will be used.
            log_beta = jnp.where(positions[..., None] < gate.sinks, 0.0, log_beta)
            out, mass = retention_attention(q, k, v, log_beta)
            # [B, H, N]
            return carry, out, jnp.moveaxis(mass, 1, 2)[:, :, jnp.minimum(times, tokens.shape[1] - 1)]

        def at_targets(hidden):
            return decoder.logits(jnp.take_along_axis(hidden, targets[..., None], axis=1))

        teacher = jax.lax.stop_gradient(at_targets(decoder(tokens, positions, plain_attend)[0]))
        layers = gates_lib.per_layer(gate_params, config, gate)
        # mass [L, B, H, N]
        hidden, _, mass = decoder(tokens, positions, gated_attend, layer_inputs=layers, remat=loss.remat)
        labels = jnp.take_along_axis(tokens, targets + 1, axis=1)
        divergence, cross_entropy = token_losses(at_targets(hidden), teacher, labels)
        answer, other = batch["answer"] & batch["valid"], ~batch["answer"] & batch["valid"]
        # [B, S, N]
        streams = jnp.moveaxis(mass, 0, 1).reshape(tokens.shape[0], config.streams, -1)
        # Global gates compete in one pool of all streams, local ones each in its own.
        pools = streams[:, None] if gate.kind == "global" else streams[:, :, None]
        parts = {
            "kl": masked_mean(divergence, answer),
            "ntp": masked_mean(cross_entropy, answer),
            "other_kl": masked_mean(divergence, other),
            "capacity": capacity_loss(pools, times, batch["length"], budget),
        }
        total = sum(loss[name] * value for name, value in parts.items())
        inside = times < batch["length"][:, None, None]
        share = masked_mean(streams / (times + 1), inside & jnp.ones_like(streams, bool))
        return total, {"loss": total, **parts, "budget": budget, "retained_share": share}

    def step(state: TrainState, params: dict, batch: dict, key: jax.Array):
        gradient, measurements = jax.grad(loss_fn, has_aux=True)(state.params, params, batch, jax.random.fold_in(key, state.step))
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        measurements["gradient_norm"] = optax.tree.norm(gradient)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state), measurements

    return step
