"""Run by test_sharding.py in a process of its own with eight fake devices: a step's loss and gradients on each mesh, against those on one device."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from retention import gates
from retention.checkpoints.arrays import fingerprint
from retention.training import sharding
from retention.training.step import gate_input_rms, init_state, make_step
from tests.conftest import small_config, small_model

CONFIG = small_config(kv_heads=8, query_heads=16, embed_dim=32, mlp_dim=48, vocab_size=64)
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "context": {"context": 8},
    "data_fsdp_tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "data_fsdp_context": {"data": 2, "fsdp": 2, "context": 2},
    "data_tensor_context": {"data": 2, "tensor": 2, "context": 2},
    "fsdp_tensor_context": {"fsdp": 2, "tensor": 2, "context": 2},
}
LOSS = ConfigDict(dict(kl=1.0, ntp=0.7, other_kl=1.3, capacity=1.0, budget_low=0.1, budget_high=0.3, remat=True))
# Its state is the last gradient.
GRADIENT = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradient, state, params: (gradient, gradient))


def batch(rows=8, length=64):
    """Rows of one to four documents, some padded."""
    rng = np.random.default_rng(0)
    arrays = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "labels", "segment_ids", "positions")}
    arrays |= {name: np.zeros((rows, length), bool) for name in ("answer", "other")}
    for row in range(rows):
        ends = [*np.sort(rng.choice(np.arange(8, length - 8), row % 4, replace=False)), length - row]
        begin = 0
        for document, end in enumerate(ends, 1):
            at = slice(begin, end)
            arrays["tokens"][row, at] = rng.integers(1, CONFIG.vocab_size, end - begin)
            arrays["labels"][row, begin : end - 1] = arrays["tokens"][row, begin + 1 : end]
            arrays["segment_ids"][row, at], arrays["positions"][row, at] = document, np.arange(end - begin)
            arrays["answer"][row, begin : end - 1] = rng.random(end - begin - 1) < 0.2
            arrays["other"][row, begin : end - 1] = ~arrays["answer"][row, begin : end - 1] & (rng.random(end - begin - 1) < 0.5)
            begin = end
    return arrays


def run(shape, gate, tied):
    config = CONFIG if not tied else small_config(**{**CONFIG.__dict__, "tie_embeddings": True})
    devices = jax.devices() if shape else jax.devices()[:1]
    mesh = sharding.make_mesh(shape, devices)
    arrays = batch()
    sharding.check(mesh, config, *arrays["tokens"].shape)
    params = small_model(config).params
    params = jax.device_put(params, sharding.params_sharding(mesh, params))
    place = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    arrays = jax.device_put(arrays, place)
    start = gates.init(config, gate, 1, gate_input_rms(config, mesh, params, arrays))
    start |= {"readout": 100 * start["readout"], "bias": jnp.ones_like(start["bias"])}
    state = init_state(start, GRADIENT)
    state = jax.device_put(state, sharding.state_sharding(mesh, state))
    state, measurements = jax.jit(make_step(config, gate, GRADIENT, LOSS, mesh))(state, params, arrays, jax.random.key(0))
    return jax.tree.map(np.asarray, (measurements, state.optimizer)), fingerprint(params)


def main(name):
    # A threshold of 0 splits every trunk, as only large ones are.
    for copied in (2**25, 0):
        sharding._COPIED_GATE_BYTES = copied
        for gate, tied in ((gates.GateConfig("global", width=16, sinks=1), True), (gates.GateConfig("local", width=16), False)):
            (one, weights), (many, split_weights) = run({}, gate, tied), run(MESHES[name], gate, tied)
            assert split_weights == weights
            for found, wanted in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
                assert wanted.any()
                np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max(), err_msg=f"{name} {gate} {copied}")
            worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True))
            print(name, gate.kind, copied, f"largest difference over the largest value: {worst:.1e}")


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    for name in sys.argv[1:] or MESHES:
        main(name)
