"""GGUF files (llama.cpp's format) of Llama, Qwen2 and Qwen3 models: configuration, dequantised parameters, tokenizer metadata."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np

from retention.checkpoints.stacking import stack
from retention.model import Config, RopeScaling, rope_frequencies
from retention.names import positive_entry, whole_entry

ARCHITECTURES = ("llama", "qwen2", "qwen3")

NAMES = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "layers": {
        "attention_norm": "blk.{}.attn_norm.weight",
        "q": "blk.{}.attn_q.weight",
        "k": "blk.{}.attn_k.weight",
        "v": "blk.{}.attn_v.weight",
        "o": "blk.{}.attn_output.weight",
        "mlp_norm": "blk.{}.ffn_norm.weight",
        "gate": "blk.{}.ffn_gate.weight",
        "up": "blk.{}.ffn_up.weight",
        "down": "blk.{}.ffn_down.weight",
        "q_bias": "blk.{}.attn_q.bias",
        "k_bias": "blk.{}.attn_k.bias",
        "v_bias": "blk.{}.attn_v.bias",
        "q_norm": "blk.{}.attn_q_norm.weight",
        "k_norm": "blk.{}.attn_k_norm.weight",
    },
}


def load(path: str | pathlib.Path, dtype: Any = "float32", place: Callable | None = None) -> tuple[Config, dict[str, Any], dict[str, Any]]:
    """Reads a GGUF file.

    Every tensor type that the `gguf` package dequantises is read; quantised tensors are expanded one at a time.

    Args:
      path: the file.
      dtype: of the parameters, float32 or bfloat16. place: (Config, a parameter's name) -> its jax Sharding; None: all on the default device.

    Returns:
      The configuration, the parameters (retention.model's, matrices [in, out], layers stacked) and the file's `tokenizer.*` metadata, which
      is what `Tokenizer.from_gguf` needs.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a GGUF file, truncated or corrupt, or a metadata key or tensor is missing or of another shape than the rest implies.
      NotImplementedError: an architecture, position encoding, tensor type or file layout that is not supported, or a bias or norm that the
        architecture has not.
    """
    path = pathlib.Path(path)
    reader = _open(path)
    try:
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except ValueError as error:  # broken UTF-8
        raise ValueError(f"{path} is corrupt: its metadata cannot be read ({error}); fetch it again") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if metadata.get("split.count", 1) > 1:
        raise NotImplementedError(f"{path} is one part of a split GGUF: merge the parts first (llama-gguf-split --merge)")
    config = _config(metadata, tensors, path)
    # Llama's converter reorders the rows of q and k for interleaved rotary embeddings; Qwen's does not.
    interleaved = metadata["general.architecture"] == "llama"

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"tensor {name} of {path} is of type {tensor.tensor_type.name}, which the gguf package does not dequantise"
            ) from error
        if interleaved and name.endswith(("attn_q.weight", "attn_k.weight")):
            return half_split(array, config.head_dim)
        return array

    shapes = {name: tuple(tensor.shape.tolist()[::-1]) for name, tensor in tensors.items()}
    params = stack(config, dtype, NAMES, shapes, read, str(path), place)
    return config, params, {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}


def half_split(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows [heads*D, E] of a projection from interleaved rotary pairs (2i, 2i+1) to half-split ones (i, i + D/2)."""
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _open(path: pathlib.Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise FileNotFoundError(f"there is no GGUF file {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        # What a file that ends too early makes the reader say depends on where it ends.
        raise ValueError(
            f"{path} is truncated or corrupt: {path.stat().st_size:,} bytes do not hold what its header announces; fetch it again ({error})"
        ) from error
    if reader.byte_order == "S":
        raise NotImplementedError(f"{path} is stored in the other byte order than this machine's, which is not supported")
    return reader


def _config(metadata: dict[str, Any], tensors: dict[str, gguf.ReaderTensor], path: pathlib.Path) -> Config:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise NotImplementedError(f"{path} holds a model of architecture {architecture!r}; supported are {', '.join(ARCHITECTURES)}")

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"{architecture}.{key}", default)
        if found is None:
            raise ValueError(f"{path} has no metadata key {architecture}.{key}")
        if isinstance(found, list):
            raise NotImplementedError(f"{path} has another {architecture}.{key} in each layer, which is not supported")
        return found

    def whole(key: str, default: Any = None) -> int:
        return whole_entry(path, f"{architecture}.{key}", value(key, default))

    def positive(key: str, default: Any = None) -> float:
        return positive_entry(path, f"{architecture}.{key}", value(key, default))

    if value("expert_count", 0):
        raise NotImplementedError(f"{path} holds a mixture of experts, which is not supported")
    if NAMES["embed"] not in tensors:
        raise ValueError(f"{path} has no tensor {NAMES['embed']}, which a model of its configuration needs")
    query_heads = whole("attention.head_count")
    embed_dim = whole("embedding_length")
    head_dim = whole("attention.key_length", embed_dim // query_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if value(key, head_dim) != head_dim:
            raise NotImplementedError(f"{path} has {architecture}.{key} = {value(key)}; only {head_dim}, the head dimension, is supported")
    max_positions = whole("context_length")
    scaling = _rope_scaling(metadata, architecture, max_positions, path)
    if scaling and scaling.kind == "yarn":
        # Qwen's model cards add YaRN and leave the context length at the first training length.
        max_positions = max(max_positions, int(scaling.factor * scaling.original_max_positions))
    config = Config(
        # The tokens' list may be shorter than the table (padding), and vocab_size is an optional key: the table itself decides.
        vocab_size=int(tensors[NAMES["embed"]].shape[-1]),
        layers=whole("block_count"),
        embed_dim=embed_dim,
        mlp_dim=whole("feed_forward_length"),
        query_heads=query_heads,
        kv_heads=whole("attention.head_count_kv", query_heads),
        head_dim=head_dim,
        max_positions=max_positions,
        rope_theta=positive("rope.freq_base", 10_000.0),
        rope_scaling=scaling,
        norm_eps=positive("attention.layer_norm_rms_epsilon"),
        tie_embeddings=NAMES["head"] not in tensors,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
    )
    if "rope_freqs.weight" in tensors:
        if scaling:
            raise NotImplementedError(f"{path} has both {architecture}.rope.scaling of type {scaling.kind!r} and a rope_freqs.weight, which is not supported")
        return _llama3_scaling(config, tensors["rope_freqs.weight"].data, path)
    return config


def _rope_scaling(metadata: dict[str, Any], architecture: str, max_positions: int, path: pathlib.Path) -> RopeScaling | None:
    prefix = f"{architecture}.rope.scaling."
    found = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    # As llama.cpp reads them: the old key's factor where there is no newer one, linear where no type is given, and a factor of 0 or none as 1.
    old = metadata.get(f"{architecture}.rope.scale_linear")
    kind, factor = found.pop("type", "linear"), found.pop("factor", old) or 1.0
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise NotImplementedError(f"{path} uses {prefix}type = {kind!r}; supported are linear and yarn")
    positive_entry(path, f"{prefix}factor", factor)
    found.pop("finetuned", None)
    scaling = RopeScaling(
        kind=kind,
        factor=factor,
        original_max_positions=found.pop("original_context_length", max_positions),
        beta_fast=found.pop("yarn_beta_fast", 32.0),
        beta_slow=found.pop("yarn_beta_slow", 1.0),
    )
    if found:
        raise NotImplementedError(f"{path} sets {prefix}{next(iter(found))}, which is not supported")
    return None if factor == 1 else scaling


def _llama3_scaling(config: Config, divisors: np.ndarray, path: pathlib.Path) -> Config:
    """Llama 3.1's scaling, which GGUF stores only as its effect: what each of the D/2 frequencies is divided by.

    Its releases differ in the factor alone, which is the largest divisor; other settings would leave another curve, so the curve tells.
    """
    scaling = RopeScaling(kind="llama3", factor=round(float(divisors.max()), 4), original_max_positions=8192)
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    expected = rope_frequencies(dataclasses.replace(config, rope_scaling=None))[0] / rope_frequencies(scaled)[0]
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise NotImplementedError(f"{path} holds a rope_freqs.weight that is not Llama 3.1's rope scaling, which is not supported")
    return scaled
