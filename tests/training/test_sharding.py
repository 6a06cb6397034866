"""Where arrays lie on a mesh, and that a step is the same on every mesh."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from configs import smollm2_135m
from retention import gates, model
from retention.training import sharding
from retention.training.step import init_state, make_optimizer
from tests.conftest import small_config
from tests.training.sharded_step import CONFIG, MESHES

QUICK = "fsdp_tensor_context"  # of the meshes, as it has all kinds of splits


def abstract(**shape):
    return AbstractMesh(tuple(shape.get(axis, 1) for axis in sharding.AXES), sharding.AXES)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What runs on one device is compiled once for all meshes."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in MESHES])
def test_step_on_a_mesh_is_that_on_one_device(name, cache):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Compiling is what takes the time.
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "tests.training.sharded_step", name]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(name) == 4  # two kinds of gates, whole and split


def test_make_mesh():
    """Numbers stand for devices."""
    mesh = sharding.make_mesh({"context": 2, "data": -1}, range(8))
    assert mesh.axis_names == ("data", "fsdp", "tensor", "context") and mesh.devices.shape == (4, 1, 1, 2)
    assert mesh.devices.ravel().tolist() == list(range(8))  # neighbours share a row's tokens
    assert sharding.make_mesh({"fsdp": 2, "tensor": 4}, range(8)).devices.shape == (1, 2, 4, 1)
    assert sharding.make_mesh({"fsdp": -1, "tensor": 8}, range(8)).devices.shape == (1, 1, 8, 1)
    assert sharding.make_mesh({"data": -1}).devices.ravel().tolist() == jax.devices()


def test_make_mesh_names_an_unknown_axis():
    with pytest.raises(ValueError, match="^mesh has an axis 'model'; its axes are data, fsdp, tensor, context$"):
        sharding.make_mesh({"data": 8, "model": 1}, range(8))


@pytest.mark.parametrize(
    "shape", [{}, {"data": 4}, {"data": 16}, {"data": 3, "fsdp": -1}, {"data": 16, "fsdp": -1}, {"data": -1, "fsdp": -1}, {"data": 0}, {"data": -2}], ids=str
)
def test_make_mesh_names_what_does_not_fit(shape):
    sizes = ", ".join(f"{axis}={shape.get(axis, 1)}" for axis in ("data", "fsdp", "tensor", "context"))
    with pytest.raises(ValueError, match=f"^mesh {sizes} does not fit 8 devices"):
        sharding.make_mesh(shape, range(8))


def test_check_takes_what_divides():
    for shape in MESHES.values():
        sharding.check(abstract(**shape), CONFIG, 8, 64)
    sharding.check(abstract(), small_config(), 1, 33)


@pytest.mark.parametrize(
    "shape, changes, message",
    [
        ({"data": 2, "fsdp": 4}, {"batch_size": 12}, "mesh axis data * fsdp is 8, which does not divide data.batch_size, 12"),
        ({"context": 4}, {"length": 60}, "mesh axis context, twice, is 8, which does not divide data.length, 60"),
        ({"fsdp": 8}, {"embed_dim": 36}, "mesh axis fsdp is 8, which does not divide embed_dim, 36"),
        ({"tensor": 8}, {"kv_heads": 4}, "mesh axis tensor is 8, which does not divide kv_heads, 4"),
        ({"tensor": 8}, {"mlp_dim": 44}, "mesh axis tensor is 8, which does not divide mlp_dim, 44"),
        ({"tensor": 8}, {"vocab_size": 61}, "mesh axis tensor is 8, which does not divide vocab_size, 61"),
    ],
    ids=["rows", "tokens", "embed_dim", "kv_heads", "mlp_dim", "vocab_size"],
)
def test_check_names_what_does_not_divide(shape, changes, message):
    fits = {"batch_size": 8, "length": 64, "embed_dim": 32, "kv_heads": 8, "mlp_dim": 48, "vocab_size": 64} | changes
    batch_size, length = fits.pop("batch_size"), fits.pop("length")
    with pytest.raises(ValueError) as raised:
        sharding.check(abstract(**shape), small_config(query_heads=16, **fits), batch_size, length)
    assert str(raised.value).startswith(message)


def named(tree):
    return [(path[-1].key, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize("tied", [True, False])
def test_params_sharding_splits_matrices_over_fsdp_and_tensor(tied):
    config = small_config(**CONFIG.__dict__ | {"tie_embeddings": tied, "qkv_bias": True, "qk_norm": True})
    params = jax.eval_shape(lambda: model.init(config))
    found = sharding.params_sharding(abstract(data=2, fsdp=2, tensor=2), params)
    matrices = {"embed", "q", "k", "v", "o", "gate", "up", "down"} | (set() if tied else {"head"})
    assert matrices < {name for name, _ in named(params)}
    for (name, leaf), (_, place) in zip(named(params), named(found), strict=True):
        split = {axis: size for axis, size in zip(place.spec, leaf.shape, strict=False) if axis is not None}
        if name in matrices:
            # The residual stream's axis over fsdp, the other, of heads, MLP columns or vocabulary, over tensor.
            assert split.keys() == {"fsdp", "tensor"} and split["fsdp"] == config.embed_dim != split["tensor"], name
        elif name in ("q_bias", "k_bias", "v_bias"):
            assert split == {"tensor": leaf.shape[1]}, name
        else:
            assert name.endswith("norm") and not split, name


@pytest.mark.parametrize("kind", ["global", "local"])
def test_state_sharding_splits_large_trunks_with_their_moments(kind):
    large = small_config(layers=36, embed_dim=2560)
    optimizer = make_optimizer(smollm2_135m.get_config().optimizer, 100)
    mesh = abstract(data=2, fsdp=4)

    def places(width):
        shapes = jax.eval_shape(lambda: gates.init(large, gates.GateConfig(kind, width=width)))
        state = sharding.state_sharding(mesh, jax.eval_shape(lambda: init_state(shapes, optimizer)))
        for tree in (optax.tree.get(state.optimizer, "mu"), optax.tree.get(state.optimizer, "nu"), sharding.state_sharding(mesh, shapes)):
            assert tree == state.params
        assert state.step.spec == P()
        return {name: place.spec for name, place in state.params.items() if place.spec != P()}

    trunk = {"w1": P(None, "fsdp"), "w2": P(None, "fsdp")} if kind == "global" else {"w1": P(None, "fsdp")}
    assert places(width=512) == trunk
    assert places(width=64) == {}


def test_state_sharding_names_a_width_that_does_not_fit():
    shapes = jax.eval_shape(lambda: gates.init(small_config(layers=36, embed_dim=2560), gates.GateConfig(width=510)))
    with pytest.raises(ValueError, match="fsdp is 4, which does not divide gate.width, 510"):
        sharding.state_sharding(abstract(fsdp=4), shapes)
