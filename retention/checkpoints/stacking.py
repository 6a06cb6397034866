"""From tensors named in a checkpoint to the stacked parameters of retention.model, one tensor at a time."""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from retention.model import Config


def parameter_shapes(config: Config) -> dict[str, Any]:
    """The shape of each parameter of one layer ("layers") and of the rest, in the model's own [in, out] order."""
    queries = config.query_heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    embed, mlp = config.embed_dim, config.mlp_dim
    layers = {
        "attention_norm": (embed,),
        "q": (embed, queries),
        "k": (embed, keys),
        "v": (embed, keys),
        "o": (queries, embed),
        "mlp_norm": (embed,),
        "gate": (embed, mlp),
        "up": (embed, mlp),
        "down": (mlp, embed),
    }
    if config.qkv_bias:
        layers |= {"q_bias": (queries,), "k_bias": (keys,), "v_bias": (keys,)}
    if config.qk_norm:
        layers |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    shapes = {"embed": (config.vocab_size, embed), "norm": (embed,), "layers": layers}
    return shapes if config.tie_embeddings else shapes | {"head": (embed, config.vocab_size)}


def stack(
    config: Config,
    dtype: Any,
    names: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    source: str,
    place: Callable[[Config, str], jax.sharding.Sharding] | None = None,
) -> dict[str, Any]:
    """Reads every parameter of `config`, stacks those of the layers as [L, ...] and puts them where they are to lie.

    One tensor is read at a time, into its place in an array of the final dtype, so that beside the parameters already built there is
    never more in the host's memory than one stacked parameter and one tensor, nor on a device than its own part.

    Args:
      config: the model.
      dtype: of all parameters, float32 or bfloat16.
      names: the checkpoint's name of each parameter; under "layers" with {} for the layer.
      shapes: what the checkpoint holds. Matrices are stored [out, in], embeddings [V, E].
      read: returns the named tensor, of the shape given in `shapes`.
      source: the checkpoint, for error messages.
      place: (config, a parameter's name) -> its sharding, over the devices of one process or of many; None: all on the default device.

    Raises:
      ValueError: another dtype, a tensor that is missing, or one whose shape is not the one that config implies.
      NotImplementedError: a bias or norm in the checkpoint that `config` has no parameter for.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype={dtype.name} is not supported for parameters: use float32 or bfloat16")

    def check(name: str, shape: tuple[int, ...]) -> None:
        if name not in shapes:
            raise ValueError(f"{source} has no tensor {name}, which a model of its configuration needs")
        if tuple(shapes[name]) != shape:
            raise ValueError(f"tensor {name} of {source} has shape {list(shapes[name])}, but its configuration implies {list(shape)}")

    wanted = parameter_shapes(config)
    layer_shapes = wanted.pop("layers")
    jobs = [(None, key, shape, [names[key]]) for key, shape in wanted.items()]
    for key, shape in layer_shapes.items():
        jobs.append(("layers", key, shape, [names["layers"][key].format(layer) for layer in range(config.layers)]))
    # Everything is checked before anything large is read.
    for _, key, shape, in_file in jobs:
        for name in in_file:
            check(name, shape if key == "embed" else shape[::-1])
    # Without them the decoder would be another. What no parameter takes besides changes nothing: tables of rotary angles, the head of a tied embedding,
    # heads for other uses.
    asked, decoder = {name for *_, in_file in jobs for name in in_file}, ("model.", "lm_head.", "blk.", "output")
    if unread := sorted(name for name in shapes if name.startswith(decoder) and name.endswith((".bias", "norm.weight")) and name not in asked):
        raise NotImplementedError(f"{source} has biases or norms that a model of its configuration has not, such as {unread[0]}")
    places = {key: place(config, key) for _, key, _, _ in jobs} if place else {}

    params: dict[str, Any] = {"layers": {}}
    with tqdm.tqdm(total=sum(len(job[3]) for job in jobs), desc="loading", unit="tensor", leave=False) as progress:
        for group, key, shape, in_file in jobs:
            array = np.empty((config.layers, *shape) if group else shape, dtype)
            for target, name in zip(array if group else [array], in_file, strict=True):
                tensor = read(name)
                target[...] = tensor if key == "embed" else tensor.T
                progress.update()
            placed = jax.make_array_from_callback(array.shape, places[key], array.__getitem__) if place else jnp.asarray(array)
            (params[group] if group else params)[key] = placed.block_until_ready()
            # numpy's array goes before the next one is made: jax lets go of what it has copied when the garbage collector runs.
            del array, target, tensor, placed
            gc.collect(0)
    return params
