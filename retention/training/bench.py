"""What a training step costs, in plain forward passes of the same model over the same tokens."""

import statistics
from collections.abc import Iterator

import jax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from retention import checkpoints, gates
from retention.bench import take_turns
from retention.model import full_logits
from retention.training import sharding
from retention.training.data import Pipeline
from retention.training.metrics import peak_memory_bytes
from retention.training.step import init_state, make_optimizer, make_step

ROUNDS = 9


def rows(config: ConfigDict) -> Iterator[dict]:
    """One step of an experiment on one device against the forward pass with all logits, taking turns."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    model = checkpoints.load(config.model, gates=None, dtype=config.dtype)
    gate, optimizer = gates.GateConfig(**config.gate), make_optimizer(config.optimizer, config.steps)
    pipeline = Pipeline(config.data, model.tokenizer, config.seed)
    batch = jax.device_put(next(pipeline.rows([0])), NamedSharding(mesh, sharding.BATCH))
    state = init_state(gates.init(model.config, gate), optimizer)
    key = jax.random.key(config.seed)
    step = jax.jit(make_step(model.config, gate, optimizer, config.loss, mesh)).lower(state, model.params, batch, key).compile()
    forward = jax.jit(full_logits, static_argnums=0).lower(model.config, model.params, batch["tokens"]).compile()
    runs = {"step": lambda: step(state, model.params, batch, key), "forward": lambda: forward(model.params, batch["tokens"])}
    seconds = take_turns({name: lambda run=run: run for name, run in runs.items()}, ROUNDS)
    tokens, compared = config.data.length, int(batch["answer"].sum() + batch["other"].sum())
    yield {
        "operation": "training step",
        "shape": f"{config.model}, {tokens} tokens, {compared} of them compared",
        "seconds": statistics.median(seconds["step"]),
        "forward_seconds": statistics.median(seconds["forward"]),
        "forwards": round(statistics.median(step / forward for step, forward in zip(seconds["step"], seconds["forward"], strict=True)), 2),
        "temp_bytes": step.memory_analysis().temp_size_in_bytes,
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "peak_memory_bytes": peak_memory_bytes(),
    }
