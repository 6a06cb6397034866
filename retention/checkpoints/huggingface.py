"""Hugging Face folders (config.json and safetensors) of Llama, Qwen2 and Qwen3 models, read tensor by tensor."""

import dataclasses
import json
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from retention.checkpoints.stacking import stack
from retention.model import Config, RopeScaling
from retention.names import is_positive, positive_entry, whole_entry

MODEL_TYPES = ("llama", "qwen2", "qwen3")

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers": {
        "attention_norm": "model.layers.{}.input_layernorm.weight",
        "q": "model.layers.{}.self_attn.q_proj.weight",
        "k": "model.layers.{}.self_attn.k_proj.weight",
        "v": "model.layers.{}.self_attn.v_proj.weight",
        "o": "model.layers.{}.self_attn.o_proj.weight",
        "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
        "gate": "model.layers.{}.mlp.gate_proj.weight",
        "up": "model.layers.{}.mlp.up_proj.weight",
        "down": "model.layers.{}.mlp.down_proj.weight",
        "q_bias": "model.layers.{}.self_attn.q_proj.bias",
        "k_bias": "model.layers.{}.self_attn.k_proj.bias",
        "v_bias": "model.layers.{}.self_attn.v_proj.bias",
        "q_norm": "model.layers.{}.self_attn.q_norm.weight",
        "k_norm": "model.layers.{}.self_attn.k_norm.weight",
    },
}


def load(folder: str | pathlib.Path, dtype: Any = "float32", place: Callable | None = None) -> tuple[Config, dict[str, Any]]:
    """Reads a Hugging Face folder: config.json, and model.safetensors or the shards that model.safetensors.index.json names.

    Args:
      folder: as transformers 4 or 5 saves it.
      dtype: of the parameters, float32 or bfloat16, whatever the files hold.
      place: (Config, a parameter's name) -> its jax Sharding; None: all on the default device.

    Returns:
      The configuration and the parameters (retention.model's, matrices [in, out], layers stacked).

    Raises:
      FileNotFoundError: no such folder, or no config.json, weights file or shard in it.
      ValueError: a file is truncated or corrupt, a config.json entry is missing, of another kind or at odds with another, or a tensor is missing
        or of another shape than the rest implies.
      NotImplementedError: a model, rope scaling or option that is not supported, or a bias or norm that the model has not.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    config = _config(read_json(folder / "config.json"), folder / "config.json")
    tensors: dict[str, _Tensor] = {}
    for file in _weight_files(folder):
        tensors |= _header(file)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        return np.memmap(tensor.file, tensor.dtype, "r", tensor.offset, tensor.shape)

    # Fine-tuned models may call an embedding tied that is not so any more; transformers 5 too takes the head that the file holds.
    embed, head = NAMES["embed"], NAMES["head"]
    if config.tie_embeddings and {embed, head} <= tensors.keys() and not np.array_equal(read(embed), read(head)):
        config = dataclasses.replace(config, tie_embeddings=False)
    return config, stack(config, dtype, NAMES, {name: tensor.shape for name, tensor in tensors.items()}, read, str(folder), place)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # in bytes, from the beginning of the file


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():  # as transformers: an index beside it is an older one's
        return [whole]
    if not index.is_file():
        raise FileNotFoundError(f"there is no {whole.name} and no {index.name} in {folder}: only safetensors are supported")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"the shard {file}, named by {index.name}, is missing")
    return files


def _header(file: pathlib.Path) -> dict[str, _Tensor]:
    """Where each tensor of a safetensors file lies. (The safetensors package would copy it; a mapped file takes no memory beside the parameters.)

    The format: 8 bytes, little-endian, with the length of a JSON header, the header, then the tensors at offsets counted from its end.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{file} is truncated or no safetensors file: its header would not fit in its {size:,} bytes")
        raw = stream.read(length)
    tensors = {}
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            tensors[name] = entry["dtype"], tuple(int(n) for n in entry["shape"]), 8 + length + first, 8 + length + last
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is corrupt or no safetensors file: its header cannot be read ({error})") from error
    found = {}
    for name, (kind, shape, first, last) in tensors.items():
        if kind not in DTYPES:
            raise NotImplementedError(f"tensor {name} of {file} has dtype {kind}; supported are {', '.join(DTYPES)}")
        dtype = np.dtype(DTYPES[kind])
        if last > size:
            raise ValueError(f"{file} is truncated: tensor {name} ends at byte {last:,} of {size:,}; fetch it again")
        if last - first != np.prod(shape, dtype=np.int64) * dtype.itemsize:
            raise ValueError(f"{file} is corrupt: tensor {name} has {last - first:,} bytes, which is not {kind} of shape {list(shape)}")
        found[name] = _Tensor(file, dtype, shape, first)
    return found


def _config(entries: dict[str, Any], path: pathlib.Path) -> Config:
    def value(key: str, default: Any = None) -> Any:
        found = entries.get(key)
        found = default if found is None else found
        if found is None:
            raise ValueError(f"{path} has no {key}")
        return found

    def refuse(what: str) -> None:
        raise NotImplementedError(f"{path} asks for {what}, which is not supported")

    def whole(key: str, default: Any = None) -> int:
        return whole_entry(path, key, value(key, default))

    def positive(key: str, default: Any = None) -> float:
        return float(positive_entry(path, key, value(key, default)))

    model_type = value("model_type")
    if model_type not in MODEL_TYPES:
        raise NotImplementedError(f"{path} is of model_type {model_type!r}; supported are {', '.join(MODEL_TYPES)}")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config"):
        # Qwen2's biases of q, k and v are part of the model, not an option: attention_bias means one on o too.
        if entries.get(key):
            refuse(key)
    kinds = value("layer_types", [])
    if other := [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind != "full_attention"]:
        refuse(f"layers of type {other[0]!r}")
    if value("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {entries['hidden_act']!r}")
    max_positions = whole("max_position_embeddings")
    # transformers 5 keeps theta and scaling together in rope_parameters; 4 has rope_theta and, where there is any, rope_scaling.
    if value("partial_rotary_factor", 1.0) != 1.0:
        refuse("a partial_rotary_factor")
    theta, scaling, given = positive("rope_theta", 10_000.0), None, [key for key in ("rope_parameters", "rope_scaling") if entries.get(key)]
    for key in given:
        original = entries.get("original_max_position_embeddings")
        before, (theta, scaling) = (theta, scaling), _rope(key, entries[key], theta, original, max_positions, path)
    if len(given) > 1 and before != (theta, scaling):
        raise ValueError(f"{path} has a rope_scaling that differs from its rope_parameters, which hold the scaling too: take one of the two out")
    if scaling and scaling.kind == "yarn":
        # Qwen's model cards add YaRN and leave max_position_embeddings at the first training length.
        max_positions = max(max_positions, int(scaling.factor * scaling.original_max_positions))
    query_heads = whole("num_attention_heads")
    return Config(
        vocab_size=whole("vocab_size"),
        layers=whole("num_hidden_layers"),
        embed_dim=whole("hidden_size"),
        mlp_dim=whole("intermediate_size"),
        query_heads=query_heads,
        kv_heads=whole("num_key_value_heads", query_heads),
        head_dim=whole("head_dim", whole("hidden_size") // query_heads),
        max_positions=max_positions,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=positive("rms_norm_eps", 1e-6),
        tie_embeddings=value("tie_word_embeddings", False),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
    )


def _rope(entry: str, rope: Any, theta: float, original: int | None, max_positions: int, path: pathlib.Path) -> tuple[float, RopeScaling | None]:
    """RoPE's theta, `theta` where `rope` has none, and the scaling that this entry of config.json asks for. original: the positions before scaling that
    config.json names outside of the entry, which go before its own; without any they are max_positions."""
    if not isinstance(rope, dict):
        raise ValueError(f'{path} has {entry} = {rope!r}, which must be an object such as {{"rope_type": "linear", "factor": 2.0}}')
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise NotImplementedError(f"{path} asks for a partial_rotary_factor, which is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    taken = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "original_max_position_embeddings"}
    fields = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow"),
    }
    if not isinstance(kind, str) or kind not in fields:
        raise NotImplementedError(f"{path} uses rope scaling of type {kind!r}; supported are {', '.join(fields)}")
    given = {key: value for key, value in rope.items() if key not in taken and value is not None}
    for key in given:
        if key not in fields[kind]:
            raise NotImplementedError(f"{path} sets {key!r} for rope scaling of type {kind!r}, which is not supported")
    theta, original = rope.get("rope_theta", theta), original or rope.get("original_max_position_embeddings") or max_positions
    for key, value in {**given, "rope_theta": theta, "original_max_position_embeddings": original}.items():
        if not is_positive(value):
            raise ValueError(f"{path} has {key} = {value!r} in its {entry}, which must be a number above 0")
    if kind == "default":
        return float(theta), None
    for key in fields[kind][: 3 if kind == "llama3" else 1]:
        if key not in given:
            raise ValueError(f"{path} gives no {key} for its rope scaling of type {kind!r}")
    return float(theta), RopeScaling(kind=kind, original_max_positions=original, **given)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError, or ValueError if the file holds anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
