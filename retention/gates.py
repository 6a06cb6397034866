"""Retention gates: log beta <= 0 for each token and kv head, from the hidden state that the q, k and v projections read.

METHOD: `local` is TRIM-KV's gate (arXiv 2512.03324): a trunk and a readout per layer. `global` is DBTrimKV's (arXiv 2605.09649): a deeper trunk per
layer and ONE readout shared by all layers, which puts every layer's scores on one scale, so that entries of all layers may compete for one budget.
`linear` is what METHOD says a trunk beats, for ablations: a readout per layer and no trunk, entries of all layers competing.
"""

import dataclasses
import functools
import math
import numbers

import jax
import jax.numpy as jnp
from flax import nnx

from retention.model import Config


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """A gate's shape and what it was trained for.

    kind: "global", "local" or "linear". width: of the trunk, which "linear" has not; 512 suits E >= 2048. tie_heads (global): one readout row for all
    kv heads, as the paper's text has it; the default, one row per head index, is what the authors' code does. bias: the readout's start; +18 starts
    as the full cache (beta = 1 - 1.5e-8). sinks: leading positions that training kept for ever; the policy protects as many by default.
    """

    kind: str = "global"
    width: int = 512
    tie_heads: bool = False
    bias: float = 18.0
    sinks: int = 0

    def __post_init__(self):
        if self.kind not in ("global", "local", "linear"):
            raise ValueError(f"gate kind must be 'global', 'local' or 'linear', got {self.kind!r}")
        if self.kind != "global" and self.tie_heads:
            raise ValueError(f"tie_heads belongs to the global gate; a {self.kind} gate has a readout per layer and head")
        for name, least in (("width", 1), ("sinks", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"gate {name} must be a whole number of at least {least}, got {value!r}")
        if isinstance(self.bias, bool) or not isinstance(self.bias, numbers.Real) or not math.isfinite(self.bias):
            raise ValueError(f"gate bias must be a number, got {self.bias!r}")


class Gates(nnx.Module):
    """The gates of all layers, float32, every array stacked over L but the global gate's shared readout.

    w1 [L,E,R], b1 [L,R], not in a linear gate; global only: w2 [L,R,R], b2 [L,R]; readout [R,H] ([R,1] tied; [L,R,H] local; [L,E,H] linear), bias [H]
    ([1] tied; [L,H] local and linear).

    input_rms: [L] root mean square of each layer's gate input. Given, the trunk (of a linear gate, the score) starts at one scale in every layer, which
    small models need (their inputs range over a factor of ten); left out, weights start at the papers' N(0, 0.02).
    """

    def __init__(self, config: Config, gate: GateConfig, rngs: nnx.Rngs, input_rms: jax.Array | None = None):
        layers, width = config.layers, gate.width
        heads = 1 if gate.tie_heads else config.kv_heads

        def normal(*shape, std=0.02):
            return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))

        if gate.kind != "linear":
            first = 0.02 if input_rms is None else 1 / (config.embed_dim**0.5 * input_rms[:, None, None])
            self.w1 = normal(layers, config.embed_dim, width, std=first)
            self.b1 = nnx.Param(jnp.zeros((layers, width)))
        if gate.kind == "global":
            self.w2 = normal(layers, width, width, std=0.02 if input_rms is None else 1.5 / width**0.5)
            self.b2 = nnx.Param(jnp.zeros((layers, width)))
            self.readout = normal(width, heads)
            self.bias = nnx.Param(jnp.full((heads,), gate.bias, jnp.float32))
        else:
            std = 0.02 if gate.kind == "local" or input_rms is None else 0.02 / input_rms[:, None, None]
            self.readout = normal(layers, config.embed_dim if gate.kind == "linear" else width, heads, std=std)
            self.bias = nnx.Param(jnp.full((layers, heads), gate.bias, jnp.float32))


def init(config: Config, gate: GateConfig, seed: int = 0, input_rms: jax.Array | None = None) -> dict:
    """The start of training, as a flat dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(Gates(config, gate, nnx.Rngs(seed), input_rms)))


def per_layer(params: dict, config: Config, gate: GateConfig) -> dict:
    """The same arrays with a leading L on each, to be scanned beside the layers: the shared readout is the same in every slice."""
    shared = ("readout", "bias") if gate.kind == "global" else ()
    return {name: jnp.broadcast_to(leaf, (config.layers, *leaf.shape)) if name in shared else leaf for name, leaf in params.items()}


def log_beta(layer: dict, h: jax.Array, kv_heads: int) -> jax.Array:
    """h [B,T,E] -> log beta [B,T,H] float32 <= 0, through one layer's slice of `per_layer`. METHOD section 2."""
    # float32 throughout, where a TPU would multiply in bfloat16: that steps by 0.125 near the start at 18.
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    hidden = h.astype(jnp.float32)
    if "w1" in layer:
        hidden = jax.nn.silu(product(hidden, layer["w1"]) + layer["b1"])
    if "w2" in layer:
        hidden = jax.nn.silu(product(hidden, layer["w2"]) + layer["b2"])
    score = product(hidden, layer["readout"]) + layer["bias"]
    return jnp.broadcast_to(jax.nn.log_sigmoid(score), (*h.shape[:2], kv_heads))


@dataclasses.dataclass(frozen=True)
class TrainedGates:
    """Gate parameters with the shape they have and the facts of their training (`record`: model, steps, seed, data, ...)."""

    config: GateConfig
    params: dict
    record: dict = dataclasses.field(default_factory=dict)
