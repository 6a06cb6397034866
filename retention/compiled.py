"""Reading and decoding through the compilers without the machine: what one chip must hold, and how fast its memory could let it decode."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import aot
from retention import cache as cache_lib
from retention import gates, policies, programs
from retention.checkpoints.stacking import parameter_shapes
from retention.model import Config
from retention.rows import CHUNK, PIECE

_QWEN3 = functools.partial(
    Config, vocab_size=151_936, kv_heads=8, head_dim=128, max_positions=40_960, rope_theta=1e6, norm_eps=1e-6, tie_embeddings=True, qk_norm=True
)
# The shapes of the released models, from their config.json.
MODELS = {
    "qwen3_1_7b": _QWEN3(layers=28, embed_dim=2048, mlp_dim=6144, query_heads=16),
    "qwen3_4b": _QWEN3(layers=36, embed_dim=2560, mlp_dim=9728, query_heads=32),
    "qwen3_8b": _QWEN3(layers=36, embed_dim=4096, mlp_dim=12_288, query_heads=32, tie_embeddings=False),
}
BANDWIDTH = {"v5e": 819e9, "v5p": 2765e9, "v6e": 1640e9, "h100": 3352e9}  # bytes a second of one chip's HBM, from the makers' data sheets


class Serving(NamedTuple):
    """One of MODELS, bfloat16, on one chip: B sequences of `context` tokens each, under a budget of M tokens per stream or with the full cache (None)."""

    model: str
    target: str
    batch: int
    context: int
    budget: int | None

    @property
    def label(self) -> str:
        return f"{self.model}-{self.target}-B{self.batch}-{self.context // 1024}K-{self.budget or 'full'}"


SERVINGS = tuple(
    Serving("qwen3_4b", target, batch, 131_072, budget)
    for target, batch in (("v5e", 8), ("v5p", 8), ("h100", 8), ("v5e", 1))
    for budget in (None, 2048, 512)
)


def parameters(model: Config, dtype) -> dict:
    """The model's parameters as ShapeDtypeStructs, layers stacked."""
    shapes = parameter_shapes(model)
    shapes |= {"layers": {name: (model.layers, *shape) for name, shape in shapes["layers"].items()}}
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), shapes, is_leaf=lambda x: isinstance(x, tuple))


def memory(compiled) -> dict[str, int]:
    """The bytes of one device's memory that a compiled program takes: arguments_bytes, temp_bytes, and total_bytes with the results that reuse no
    argument's."""
    found = compiled.memory_analysis()
    arguments, temp = found.argument_size_in_bytes, found.temp_size_in_bytes
    return {"arguments_bytes": arguments, "temp_bytes": temp, "total_bytes": arguments + temp + found.output_size_in_bytes - found.alias_size_in_bytes}


def serve(serving: Serving) -> dict[str, float]:
    """What the serving needs: weights_bytes, cache_bytes, decode_total_bytes and read_total_bytes (the programs of a piece of decoding and of a chunk, by
    the compiler), and tokens_per_second, all sequences together, that the chip's bandwidth allows at most when a token reads weights and cache once.

    The programs' numbers are missing where weights and cache alone exceed the chip. Raises what the compiler raises.
    """
    model, batch = MODELS[serving.model], serving.batch
    policy = policies.get("full" if serving.budget is None else "retention")
    gate = gates.GateConfig() if policy.gated else None
    plan = programs.Plan(model, gate, policy, policy.scope, 0, policy.window if isinstance(policy.window, int) else None)
    slots, width = (0, serving.context + CHUNK) if serving.budget is None else (model.streams * serving.budget, CHUNK)
    cache = jax.eval_shape(
        lambda: cache_lib.init(model.layers, model.kv_heads, model.head_dim, [serving.budget or 0] * batch, slots, width, jnp.bfloat16)
    )
    params = parameters(model, jnp.bfloat16)
    trained = jax.eval_shape(lambda: gates.init(model, gate)) if gate else None
    weights, held = size(params) + size(trained), size(cache)
    read = step_bytes(model, params, trained, batch, serving.context, serving.budget)
    out = {"weights_bytes": weights, "cache_bytes": held, "tokens_per_second": batch * BANDWIDTH[serving.target] / read}
    if weights + held > aot.HBM_GIB[serving.target] * 2**30:
        return out
    array = jax.ShapeDtypeStruct
    logits, valid, done = array((batch, model.vocab_size), jnp.float32), array((batch,), jnp.int32), array((batch,), jnp.bool)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    number = array((), jnp.float32)
    evicts = serving.budget is not None
    decode = functools.partial(programs.decode, plan, piece=PIECE, evicts=evicts)
    decoding = aot.compile_for(
        serving.target, decode, params, trained, cache, logits, done, done, keys, array((), jnp.int32), number, number, valid, donate_argnums=2
    )
    chunk = functools.partial(programs.prefill, plan, evict=evicts)
    reading = aot.compile_for(serving.target, chunk, params, trained, cache, array((batch, CHUNK), jnp.int32), valid, logits, donate_argnums=2)
    return out | {"decode_total_bytes": memory(decoding)["total_bytes"], "read_total_bytes": memory(reading)["total_bytes"]}


def step_bytes(model: Config, params: dict, trained: dict | None, batch: int, context: int, budget: int | None) -> int:
    """What a decoding step must read at least, bfloat16: all weights once, but of an embedding that is not the output's matrix too only rows; the gates once
    in a piece of steps; and the keys and values that there are: half the write buffer on average."""
    weights = size(params) - (size(params["embed"]) if "head" in params else 0) + size(trained) // PIECE
    entries = model.streams * (context if budget is None else budget + CHUNK // 2)
    return weights + batch * entries * 2 * model.head_dim * 2


def size(tree) -> int:
    """Bytes of all arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
