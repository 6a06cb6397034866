"""The decoder: Llama, Qwen2, Qwen3 and what shares their shape, from one config.

One block covers the families: RMSNorm, grouped-query attention with RoPE, SwiGLU. Qwen2 adds biases to q, k and v, Qwen3 an RMSNorm over each head
of q and k. The decoder knows neither caches nor gates: it asks an `attend` function, handed in by the caller, for each layer's attention. So the
plain forward pass, gate training and cached decoding run the very same layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retention.attention import retention_attention
from retention.rope import apply_rope

# attend(carry, x, q [B,T,H,G,D], k [B,T,H,D], v [B,T,H,D], h [B,T,E]) -> (carry, out [B,T,H,G,D], y)
# carry threads through the layers (a cache), x is this layer's slice of the scanned inputs (its index, its gate), h is the output of the input norm,
# which the gates read, and y is stacked over layers.
Attend = Callable[[Any, Any, jax.Array, jax.Array, jax.Array, jax.Array], tuple[Any, jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a family stretches RoPE beyond its first training length: "linear", "llama3" or "yarn"."""

    kind: str
    factor: float
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a decoder. `query_heads` = kv_heads * G; `max_positions` is the length the model was trained for."""

    vocab_size: int
    layers: int
    embed_dim: int
    mlp_dim: int
    query_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        """Raises ValueError for kv heads that do not share the query heads evenly, and for heads that RoPE cannot halve."""
        if self.kv_heads < 1 or self.query_heads % self.kv_heads:
            raise ValueError(f"a model's query heads must be a multiple of its kv heads, got {self.query_heads} and {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"a model's heads must have an even dimension, which RoPE halves, got {self.head_dim}")

    @property
    def group(self) -> int:
        """G, the query heads that share one kv head."""
        return self.query_heads // self.kv_heads

    @property
    def streams(self) -> int:
        """S = L*H, the kv heads of all layers."""
        return self.layers * self.kv_heads


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., E] scaled to unit root mean square, in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight


def rope_frequencies(config: Config) -> tuple[jax.Array, float]:
    """Angular frequencies [D/2] float32 and the factor that multiplies cos and sin (1 but for YaRN).

    linear: arXiv 2306.15595. llama3: the Llama 3.1 release. yarn: arXiv 2309.00071.
    """
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency, 1.0
    if scaling.kind == "linear":
        return frequency / scaling.factor, 1.0
    if scaling.kind == "llama3":
        # Fast waves stay, slow ones are stretched, and between the two the stretch is blended by how often a wave fits the first context.
        turns = scaling.original_max_positions * frequency / (2 * math.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = jnp.clip(keep, 0.0, 1.0)
        return keep * frequency + (1 - keep) * frequency / scaling.factor, 1.0
    if scaling.kind == "yarn":

        def dimension(turns):  # where a wave makes this many turns over the first context
            return half * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / math.log(config.rope_theta)

        low = max(math.floor(dimension(scaling.beta_fast)), 0)
        high = min(math.ceil(dimension(scaling.beta_slow)), config.head_dim - 1)
        stretch = jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / max(high - low, 1e-3), 0.0, 1.0)
        factor = scaling.attention_factor
        if factor is None:
            factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
        return stretch * frequency / scaling.factor + (1 - stretch) * frequency, factor
    raise NotImplementedError(f"rope_scaling.kind {scaling.kind!r} is not supported; linear, llama3 and yarn are")


class Layer(nnx.Module):
    """One block. Matrices are [in, out]: as two-dimensional products they are what XLA multiplies fastest on every platform."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        def matrix(rows, columns):
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, columns)))

        queries, keys = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
        self.config = config
        self.attention_norm = nnx.Param(jnp.ones(config.embed_dim))
        self.q = matrix(config.embed_dim, queries)
        self.k = matrix(config.embed_dim, keys)
        self.v = matrix(config.embed_dim, keys)
        self.o = matrix(queries, config.embed_dim)
        self.mlp_norm = nnx.Param(jnp.ones(config.embed_dim))
        self.gate = matrix(config.embed_dim, config.mlp_dim)
        self.up = matrix(config.embed_dim, config.mlp_dim)
        self.down = matrix(config.mlp_dim, config.embed_dim)
        if config.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros(queries))
            self.k_bias = nnx.Param(jnp.zeros(keys))
            self.v_bias = nnx.Param(jnp.zeros(keys))
        if config.qk_norm:
            self.q_norm = nnx.Param(jnp.ones(config.head_dim))
            self.k_norm = nnx.Param(jnp.ones(config.head_dim))

    def __call__(self, x, cos, sin, attend: Attend, carry, layer_input):
        config = self.config
        # [B, T, E]
        h = rms_norm(x, self.attention_norm[...], config.norm_eps)
        q, k, v = h @ self.q[...], h @ self.k[...], h @ self.v[...]
        if config.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        # [B, T, H, G, D]
        q = q.reshape(*h.shape[:2], config.kv_heads, config.group, config.head_dim)
        # [B, T, H, D]
        k = k.reshape(*h.shape[:2], config.kv_heads, config.head_dim)
        v = v.reshape(k.shape)
        if config.qk_norm:
            q = rms_norm(q, self.q_norm[...], config.norm_eps)
            k = rms_norm(k, self.k_norm[...], config.norm_eps)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        carry, out, y = attend(carry, layer_input, q, k, v, h)
        x = x + out.reshape(*h.shape[:2], -1) @ self.o[...]
        h = rms_norm(x, self.mlp_norm[...], config.norm_eps)
        return x + (jax.nn.silu(h @ self.gate[...]) * (h @ self.up[...])) @ self.down[...], carry, y


class OneOf:
    """Matrix i of several that lie apart, as the right side of a product: one program for each, that reads it where it lies."""

    def __init__(self, matrices: tuple[jax.Array, ...], i: jax.Array):
        self.matrices, self.i = matrices, i

    def __getitem__(self, _):
        return self

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return jax.lax.switch(self.i, [lambda x, matrix=matrix: x @ matrix for matrix in self.matrices], x)


class Decoder(nnx.Module):
    """Embedding, L scanned layers, final norm, head. Its pure state is the nested dict of arrays that the loaders fill; matrices of layers may also be tuples
    of one array for each layer (see `Model.apart`)."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.embed_dim)))

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stack(rngs):
            return Layer(config, rngs)

        self.layers = stack(rngs)
        self.norm = nnx.Param(jnp.ones(config.embed_dim))
        if not config.tie_embeddings:
            self.head = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.embed_dim, config.vocab_size)))

    def __call__(self, tokens, positions, attend: Attend, carry=None, layer_inputs=None, remat=False, place=lambda x, layer: (x, layer), outputs=False):
        """Runs all layers.

        Args:
          tokens: [B, T] int. positions: [B, T] int, true positions (they set RoPE).
          attend: see `Attend`. carry: its state before the first layer. layer_inputs: pytree of [L, ...] arrays, sliced a layer at a time.
          remat: recompute each layer in the backward pass instead of keeping its activations.
          place: (x [B, T, E], a layer's parameters) -> both, on entering each layer: where training on many devices says what lies where.
          outputs: return what each block puts out too.

        Returns:
          hidden [B, T, E] after the final norm, the last carry, and the layers' y stacked to [L, ...]; with `outputs` (y, x [L, B, T, E]) in its place.
        """
        frequency, factor = rope_frequencies(self.config)
        # [B, T, D/2]
        angle = positions[..., None].astype(jnp.float32) * frequency
        cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)
        graph, params = nnx.split(self.layers)
        stacked = nnx.to_pure_dict(params)
        separate = {name: stacked.pop(name) for name in list(stacked) if isinstance(stacked[name], tuple)}

        def block(state, scanned):
            i, layer, layer_input = scanned
            x, layer = place(state[0], layer)
            nnx.replace_by_pure_dict(params, layer | {name: OneOf(matrices, i) for name, matrices in separate.items()})
            x, carry, y = nnx.merge(graph, params)(x, cos, sin, attend, state[1], layer_input)
            return (x, carry), (y, x) if outputs else y

        # A scan keeps its iterations apart, so that nothing need be done against common subexpressions.
        block = jax.checkpoint(block, prevent_cse=False) if remat else block
        (x, carry), ys = jax.lax.scan(block, (self.embed[...][tokens], carry), (jnp.arange(self.config.layers), stacked, layer_inputs))
        return rms_norm(x, self.norm[...], self.config.norm_eps), carry, ys

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., E] -> [..., V] float32."""
        if self.config.tie_embeddings:
            return jnp.einsum("...E,VE->...V", hidden, self.embed[...], preferred_element_type=jnp.float32)
        return jnp.einsum("...E,EV->...V", hidden, self.head[...], preferred_element_type=jnp.float32)


def init(config: Config, seed: int = 0, dtype=jnp.float32) -> dict:
    """Random parameters, N(0, 0.02), as the nested dict that `bind` takes."""

    @jax.jit
    def make():  # in one program, which need not hold all of them in float32
        return jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(seed)))))

    return make()


def bind(config: Config, params: dict) -> Decoder:
    """The decoder over these parameters. Building it costs no arithmetic, so jitted functions take (config static, params) and bind inside."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def plain_attend(carry, layer_input, q, k, v, h):
    """Causal attention over the tokens at hand: the full cache, no gates."""
    return carry, retention_attention(q, k, v)[0], None


@functools.partial(jax.jit, static_argnums=0)
def full_logits(config: Config, params: dict, tokens: jax.Array) -> jax.Array:
    """tokens [B, T] int -> [B, T, V] float32: the full cache, no gates. The door for parity checks."""
    decoder = bind(config, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _, _ = decoder(tokens, positions, plain_attend)
    return decoder.logits(hidden)


@dataclasses.dataclass(frozen=True)
class Model:
    """What `retention.load` returns: a frozen decoder, its gates (None without) and its tokenizer (None without)."""

    config: Config
    params: dict
    gates: Any = None
    tokenizer: Any = None

    @functools.cached_property
    def apart(self) -> dict:
        """params for programs that read few tokens at a time. On a CPU the layers' matrices are there one by one, in the memory that they have in params:
        a scan over the layers copies what it slices from a stack, and that takes as long as to multiply it with one row."""
        layers = {name: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf for name, leaf in self.params["layers"].items()}
        device, *others = {device for leaf in layers.values() for device in leaf.devices()}
        if others or device.platform != "cpu":
            return self.params

        def split(stack):
            # Bound to a device only where the stack is: else programs would be compiled once more, for the caches that they put out.
            return tuple(jax.device_put(matrix, device if stack.committed else None) for matrix in np.asarray(stack))

        return self.params | {"layers": layers | {name: split(leaf) for name, leaf in layers.items() if leaf.ndim == 3}}

    def logits(self, tokens) -> jax.Array:
        """tokens [B, T] int -> logits [B, T, V] float32 of the full cache, without gates. Raises ValueError for any other tokens."""
        tokens = np.asarray(tokens)  # as they are: a jax array of 32 bits would wrap
        if tokens.ndim != 2 or tokens.size == 0:
            raise ValueError(f"tokens must be [B, T] with T > 0 and B > 0, got shape {tokens.shape}")
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be whole numbers, the ids of tokens, got {jax.dtypes.canonicalize_dtype(tokens.dtype)}")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:  # XLA would clamp them without a word
            raise ValueError(f"tokens must be ids from 0 to {self.config.vocab_size - 1}, got {tokens.min()} to {tokens.max()}")
        return full_logits(self.config, self.params, tokens)
