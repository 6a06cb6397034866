"""Where everything lies on a mesh of devices: one table by the role of an array, and the same program from one device to a pod.

Axes of the mesh:
  data     copies of the frozen weights; each works on its own rows of the batch
  fsdp     as data, but the weights are split among its devices and each layer's are gathered when it runs
  tensor   heads, MLP columns and vocabulary are split
  context  each row's tokens are split; keys and values with their log beta are gathered for attention
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from retention.model import Config

AXES = ("data", "fsdp", "tensor", "context")
ROWS = ("data", "fsdp")
BATCH = P(ROWS, "context")  # every array [B, T, ...]

# Role -> (how it is kept, how it is used). What is kept split over fsdp is gathered for use. Names are those of the parameters; norms and biases are small.
_BACKBONE = {
    "embed": (P("tensor", "fsdp"), P("tensor", None)),  # [V, E]
    "head": (P("fsdp", "tensor"), P(None, "tensor")),  # [E, V]
    **dict.fromkeys(("q", "k", "v", "gate", "up"), (P(None, "fsdp", "tensor"), P(None, "tensor"))),  # kept [L, E, ..], used a layer at a time
    **dict.fromkeys(("o", "down"), (P(None, "tensor", "fsdp"), P("tensor", None))),  # [L, .., E]
    **dict.fromkeys(("q_bias", "k_bias", "v_bias"), (P(None, "tensor"), P("tensor"))),  # [L, ..]
}
# A trunk larger than this is split over fsdp, and the optimiser's moments with it; a smaller one is copied, as gathering it would cost more than it saves.
_COPIED_GATE_BYTES = 2**25
_GATES = {"w1": P(None, "fsdp"), "w2": P(None, "fsdp")}  # [L, E, R], [L, R, R]


def make_mesh(shape: Mapping[str, int], devices: Sequence | None = None) -> Mesh:
    """A mesh of AXES. shape: size of each axis by name, 1 where left out; one may be -1 and takes what is left of `devices` (all there are by default).

    Raises ValueError for an unknown axis or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if unknown := sorted(set(shape) - set(AXES)):
        raise ValueError(f"mesh has an axis {unknown[0]!r}; its axes are {', '.join(AXES)}")
    sizes = [shape.get(axis, 1) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1 or len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        wanted = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(f"mesh {wanted} does not fit {len(devices)} devices: the sizes must multiply to that (one may be -1, the rest)")
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    # Devices of one host are neighbours on the last axes, where most is exchanged.
    return Mesh(np.array(devices).reshape(sizes), AXES)


def check(mesh: Mesh, config: Config, batch_size: int, length: int) -> None:
    """Raises ValueError where an axis of the mesh does not divide what it splits: one sentence naming both."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    # Each row is dealt to context devices as pieces from both of its ends, see step.py.
    pieces = 2 * mesh.shape["context"] if mesh.shape["context"] > 1 else 1
    splits = [("data * fsdp", rows, "data.batch_size", batch_size), ("context, twice,", pieces, "data.length", length)]
    splits += [("fsdp", mesh.shape["fsdp"], "embed_dim", config.embed_dim)]
    splits += [("tensor", mesh.shape["tensor"], name, getattr(config, name)) for name in ("kv_heads", "mlp_dim", "vocab_size")]
    for axis, size, name, value in splits:
        if value % size:
            raise ValueError(f"mesh axis {axis} is {size}, which does not divide {name}, {value}; give a mesh or a {name} for which it does")


def parameter_sharding(mesh: Mesh, name: str) -> NamedSharding:
    """How the backbone's parameter of this name is kept, those of the layers stacked."""
    return NamedSharding(mesh, _BACKBONE.get(name, (P(),))[0])


def params_sharding(mesh: Mesh, params: Any) -> Any:
    """A NamedSharding for each array of the backbone's parameters (arrays or their shapes)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: parameter_sharding(mesh, path[-1].key), params)


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """A NamedSharding for each array of gates, gradients or a TrainState: by the gate's name, wherever in the optimiser's state it stands.

    Raises ValueError where fsdp does not divide the width of a trunk that is large enough to be split.
    """

    def place(path, leaf):
        name = next((key.key for key in path if isinstance(key, jax.tree_util.DictKey)), None)
        large = leaf.size * leaf.dtype.itemsize > _COPIED_GATE_BYTES
        if large and name == "w2" and leaf.shape[1] % mesh.shape["fsdp"]:
            raise ValueError(f"mesh axis fsdp is {mesh.shape['fsdp']}, which does not divide gate.width, {leaf.shape[1]}; give one for which it does")
        return NamedSharding(mesh, _GATES.get(name, P()) if large else P())

    return jax.tree_util.tree_map_with_path(place, state)


def used(mesh: Mesh, params: Any) -> Any:
    """Parameters of the backbone, or of one of its layers, gathered for use."""

    def gather(path, leaf):
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, _BACKBONE.get(path[-1].key, (None, P()))[1]))

    return jax.tree_util.tree_map_with_path(gather, params)


def by_token(mesh: Mesh, x: jax.Array) -> jax.Array:
    """x [B, T, ...] with its rows and tokens where they belong."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))
