"""A small random model with gates that spread their scores: everything that a real one does, in milliseconds."""

import gc

import jax
import pytest

from retention import gates, model


def small_config(**changes) -> model.Config:
    shape = dict(vocab_size=61, layers=3, embed_dim=32, mlp_dim=48, query_heads=4, kv_heads=2, head_dim=8, max_positions=4096)
    return model.Config(**{**shape, **changes})


def small_model(config: model.Config, seed: int = 0, sinks: int = 0) -> model.Model:
    params = model.init(config, seed)
    # At N(0, 0.02) so small a model attends evenly to everything, and an evicted entry would hardly be missed.
    params["layers"] = {name: leaf * (10.0 if leaf.ndim == 3 else 1.0) for name, leaf in params["layers"].items()}
    gate = gates.GateConfig(width=16, bias=3.0, sinks=sinks)
    gate_params = gates.init(config, gate, seed)
    gate_params["readout"] = 3.0 * jax.random.normal(jax.random.key(seed), gate_params["readout"].shape)
    gate_params |= {name: 20 * gate_params[name] for name in ("w1", "w2")}
    return model.Model(config, params, gates.TrainedGates(gate, gate_params))


@pytest.fixture(scope="session")
def small() -> model.Model:
    return small_model(small_config())


@pytest.fixture(scope="module", autouse=True)
def free_compiled_programs():
    """Every compiled program maps memory, a process may hold 65,530 maps (vm.max_map_count), and XLA crashes when they run out."""
    yield
    jax.clear_caches()
    gc.collect()
