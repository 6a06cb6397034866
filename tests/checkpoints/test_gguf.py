"""Small random models written with gguf.GGUFWriter and read back."""

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from retention.checkpoints import gguf as loader
from retention.model import RopeScaling

L, E, F, V, N, H = 2, 64, 96, 50, 4, 2


class Checkpoint:
    """What one GGUF file is to hold. Tests change it before writing."""

    def __init__(self, architecture="llama", head_dim=16, tied=True, seed=0):
        random = np.random.default_rng(seed)

        def normal(*shape):
            return random.standard_normal(shape).astype(np.float32)

        self.architecture = architecture
        self.metadata = {
            "context_length": 128,
            "embedding_length": E,
            "block_count": L,
            "feed_forward_length": F,
            "attention.head_count": N,
            "attention.head_count_kv": H,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 5000.0,
        }
        if head_dim != E // N:
            self.metadata |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
        self.tensors = {"token_embd.weight": normal(V, E), "output_norm.weight": normal(E)}
        if not tied:
            self.tensors["output.weight"] = normal(V, E)
        for layer in range(L):
            shapes = {
                "attn_norm.weight": [E],
                "attn_q.weight": [N * head_dim, E],
                "attn_k.weight": [H * head_dim, E],
                "attn_v.weight": [H * head_dim, E],
                "attn_output.weight": [E, N * head_dim],
                "ffn_norm.weight": [E],
                "ffn_gate.weight": [F, E],
                "ffn_up.weight": [F, E],
                "ffn_down.weight": [E, F],
            }
            if architecture == "qwen2":
                shapes |= {"attn_q.bias": [N * head_dim], "attn_k.bias": [H * head_dim], "attn_v.bias": [H * head_dim]}
            if architecture == "qwen3":
                shapes |= {"attn_q_norm.weight": [head_dim], "attn_k_norm.weight": [head_dim]}
            self.tensors |= {f"blk.{layer}.{name}": normal(*shape) for name, shape in shapes.items()}

    def write(self, path, kind=gguf.GGMLQuantizationType.F32):
        """Writes it, matrices as `kind`."""
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self.metadata.items():
            key = f"{self.architecture}.{key}"
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
            else:
                writer.add_uint32(key, value)
        writer.add_string("tokenizer.ggml.model", "gpt2")
        for name, tensor in self.tensors.items():
            own = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quants.quantize(tensor, own), raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def interleave(weight, head_dim):
    """What llama.cpp's converter does to the rows of q and k: row i and row i + D/2 of a head become its rows 2i and 2i + 1."""
    result = np.empty_like(weight)
    for start in range(0, len(weight), head_dim):
        for i in range(head_dim // 2):
            result[start + 2 * i] = weight[start + i]
            result[start + 2 * i + 1] = weight[start + head_dim // 2 + i]
    return result


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("architecture", "head_dim"), [("llama", 16), ("qwen2", 16), ("qwen3", 32)])
def test_parameters_are_exact(tmp_path, architecture, head_dim, tied):
    source = Checkpoint(architecture, head_dim, tied)
    tensors = dict(source.tensors)
    if architecture == "llama":
        for name in tensors:
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                source.tensors[name] = interleave(tensors[name], head_dim)
    config, params, metadata = loader.load(source.write(tmp_path / "model.gguf"), "float32")

    assert (config.vocab_size, config.layers, config.embed_dim, config.mlp_dim) == (V, L, E, F)
    assert (config.query_heads, config.kv_heads, config.head_dim, config.max_positions) == (N, H, head_dim, 128)
    assert (config.rope_theta, config.rope_scaling, config.norm_eps) == (5000.0, None, pytest.approx(1e-5))
    assert (config.tie_embeddings, config.qkv_bias, config.qk_norm) == (tied, architecture == "qwen2", architecture == "qwen3")
    assert metadata == {"tokenizer.ggml.model": "gpt2"}

    expected = {"embed": tensors["token_embd.weight"], "norm": tensors["output_norm.weight"]}
    if not tied:
        expected["head"] = tensors["output.weight"].T
    assert params.keys() == expected.keys() | {"layers"}
    for key, value in expected.items():
        np.testing.assert_array_equal(params[key], value)
    names = {
        "attention_norm": "attn_norm.weight",
        "q": "attn_q.weight",
        "k": "attn_k.weight",
        "v": "attn_v.weight",
        "o": "attn_output.weight",
        "mlp_norm": "ffn_norm.weight",
        "gate": "ffn_gate.weight",
        "up": "ffn_up.weight",
        "down": "ffn_down.weight",
    }
    if architecture == "qwen2":
        names |= {"q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias"}
    if architecture == "qwen3":
        names |= {"q_norm": "attn_q_norm.weight", "k_norm": "attn_k_norm.weight"}
    assert params["layers"].keys() == names.keys()
    for key, name in names.items():
        assert params["layers"][key].dtype == jnp.float32
        np.testing.assert_array_equal(params["layers"][key], np.stack([tensors[f"blk.{layer}.{name}"].T for layer in range(L)]))


def test_half_split_turns_interleaved_rotation_into_half_split_rotation():
    dim, heads = 8, 3
    random = np.random.default_rng(0)
    weight, x = random.standard_normal((heads * dim, E)), random.standard_normal(E)
    angle = 7 * 100.0 ** (-np.arange(dim // 2) / (dim // 2))

    pairs = (weight @ x).reshape(heads, dim // 2, 2)
    interleaved = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
    halves = (loader.half_split(weight, dim) @ x).reshape(heads, 2, dim // 2)
    half_split = (halves[:, 0] + 1j * halves[:, 1]) * np.exp(1j * angle)
    np.testing.assert_allclose(half_split, interleaved)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_tensor_types(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    source = Checkpoint("qwen2")
    _, params, _ = loader.load(source.write(tmp_path / "model.gguf", kind), "float32")
    for layer in range(L):
        weight = source.tensors[f"blk.{layer}.ffn_down.weight"]
        expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        np.testing.assert_array_equal(params["layers"]["down"][layer], expected.T)
        assert 0 < np.abs(expected - weight).max() < 0.6


def test_bfloat16(tmp_path):
    source = Checkpoint("qwen2")
    _, params, _ = loader.load(source.write(tmp_path / "model.gguf"), "bfloat16")
    assert params["layers"]["up"].dtype == params["norm"].dtype == jnp.bfloat16
    expected = source.tensors["blk.1.ffn_up.weight"].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(params["layers"]["up"][1], expected)


def llama3_divisors(factor, low=1.0, high=4.0, theta=5000.0, dim=16):
    """Llama 3.1's rule as its release states it, in wavelengths."""
    divisors = []
    for i in range(dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / dim)
        if wavelength < 8192 / high:
            divisors.append(1.0)
        elif wavelength > 8192 / low:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_rope_scaling(tmp_path):
    def scaling(entries, tensors=(), old=None):
        source = Checkpoint("llama")
        source.metadata |= {f"rope.scaling.{key}": value for key, value in entries.items()}
        source.metadata |= {} if old is None else {"rope.scale_linear": old}
        source.tensors |= dict(tensors)
        return loader.load(source.write(tmp_path / "model.gguf"), "float32")[0]

    assert scaling({"type": "none"}).rope_scaling is None
    assert scaling({"type": "linear", "factor": 4.0}).rope_scaling == RopeScaling("linear", 4.0, 128)
    config = scaling({"type": "yarn", "factor": 4.0, "original_context_length": 100, "yarn_beta_fast": 16.0})
    assert config.rope_scaling == RopeScaling("yarn", 4.0, 100, beta_fast=16.0)
    assert config.max_positions == 400
    divisors = llama3_divisors(8.0)
    assert len(set(divisors)) > 2  # the blended part is there too
    assert scaling({}, {"rope_freqs.weight": divisors}.items()).rope_scaling == RopeScaling("llama3", 8.0, 8192)

    # llama.cpp's defaults: linear where no type is given, the factor under its old name where there is no new one.
    assert scaling({"factor": 4.0}).rope_scaling == RopeScaling("linear", 4.0, 128)
    assert scaling({}, old=4.0).rope_scaling == scaling({"type": "linear"}, old=4.0).rope_scaling == RopeScaling("linear", 4.0, 128)
    assert scaling({"factor": 2.0}, old=4.0).rope_scaling == RopeScaling("linear", 2.0, 128)
    assert scaling({"type": "none", "factor": 4.0}).rope_scaling is None
    assert scaling({"original_context_length": 100}).rope_scaling is None

    for entries in ({"type": "yarn", "factor": 4.0}, {"factor": 4.0}):
        with pytest.raises(NotImplementedError, match="model.gguf has both llama.rope.scaling of type '(yarn|linear)' and a rope_freqs.weight"):
            scaling(entries, {"rope_freqs.weight": divisors}.items())
    with pytest.raises(ValueError, match="rope.scaling.factor = -4.0, which must be a number above 0"):
        scaling({"factor": -4.0})
    with pytest.raises(NotImplementedError, match="model.gguf.*rope_freqs.weight"):
        scaling({}, {"rope_freqs.weight": llama3_divisors(8.0, high=8.0)}.items())
    with pytest.raises(NotImplementedError, match="longrope.*linear and yarn"):
        scaling({"type": "longrope", "factor": 4.0})
    with pytest.raises(NotImplementedError, match="yarn_log_multiplier"):
        scaling({"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.1})
    # A factor that scales nothing.
    for entries in ({"type": "linear"}, {"factor": 0.0}, {"type": "linear", "factor": 1.0}):
        assert scaling(entries).rope_scaling is None
        assert scaling(entries, {"rope_freqs.weight": divisors}.items()).rope_scaling.kind == "llama3"
    with pytest.raises(NotImplementedError, match="sets llama.rope.scaling.attn_factor, which is not supported"):
        scaling({"attn_factor": 2.0})


def test_no_file_or_another_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.gguf"):
        loader.load(tmp_path / "absent.gguf", "float32")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        loader.load(tmp_path, "float32")
    for content in (b"", b"PK\3\4 and more"):
        (tmp_path / "other.gguf").write_bytes(content)
        with pytest.raises(ValueError, match="other.gguf is not a GGUF file"):
            loader.load(tmp_path / "other.gguf", "float32")


def test_metadata_that_are_no_text(tmp_path):
    path = Checkpoint().write(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes().replace(b"gpt2", b"g\xa2t2"))
    with pytest.raises(ValueError, match="model.gguf is corrupt: its metadata cannot be read"):
        loader.load(path, "float32")


def test_truncated_anywhere(tmp_path):
    whole = Checkpoint("qwen3").write(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    # The header and the list of tensors byte by byte, the data in larger steps, and one byte short.
    for length in [*range(4, 600), *range(600, len(whole), 9973), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.gguf is truncated or corrupt"):
            loader.load(cut, "float32")


def changed(metadata=(), tensors=(), drop=(), architecture="qwen3"):
    source = Checkpoint(architecture)
    source.metadata |= dict(metadata)
    source.tensors |= dict(tensors)
    for name in drop:
        (source.tensors if name in source.tensors else source.metadata).pop(name)
    return source


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (changed(architecture="gemma3"), NotImplementedError, "'gemma3'; supported are llama, qwen2, qwen3"),
        (changed({"expert_count": 8}), NotImplementedError, "mixture of experts"),
        (changed({"rope.dimension_count": 8}), NotImplementedError, "qwen3.rope.dimension_count = 8; only 16"),
        (changed({"feed_forward_length": [96, 48]}), NotImplementedError, "qwen3.feed_forward_length in each layer"),
        (changed(drop=["embedding_length"]), ValueError, "no metadata key qwen3.embedding_length"),
        (changed(drop=["token_embd.weight"]), ValueError, "no tensor token_embd.weight"),
        (changed(drop=["blk.1.ffn_up.weight"]), ValueError, "no tensor blk.1.ffn_up.weight"),
        (changed({"block_count": 3}), ValueError, "no tensor blk.2.attn_norm.weight"),
        (
            changed(tensors={"blk.1.attn_k.weight": np.zeros((48, E), np.float32)}),
            ValueError,
            r"blk.1.attn_k.weight.*has shape \[48, 64\], but its configuration implies \[32, 64\]",
        ),
        (
            changed(tensors={"blk.1.attn_k.bias": np.zeros(32, np.float32)}, architecture="llama"),
            NotImplementedError,
            "biases or norms that a model of its configuration has not, such as blk.1.attn_k.bias",
        ),
        (changed(tensors={"blk.0.ffn_up.bias": np.zeros(96, np.float32)}, architecture="qwen2"), NotImplementedError, "such as blk.0.ffn_up.bias"),
        (
            changed(tensors={"blk.1.attn_q_norm.weight": np.ones(16, np.float32)}, architecture="llama"),
            NotImplementedError,
            "biases or norms .*such as blk.1.attn_q_norm.weight",
        ),
        (changed({"block_count": 1}), NotImplementedError, "such as blk.1.attn_k_norm.weight"),
        (changed({"attention.head_count": 0}), ValueError, "qwen3.attention.head_count = 0, which must be a whole number of at least 1"),
        (changed({"context_length": 128.0}), ValueError, "qwen3.context_length = 128.0, which must be a whole number"),
        (changed({"rope.freq_base": 0.0}), ValueError, "qwen3.rope.freq_base = 0.0, which must be a number above 0"),
        (changed({"feed_forward_length": 128}), ValueError, r"ffn_gate.weight.*has shape \[96, 64\].*\[128, 64\]"),
    ],
)
def test_bad_contents(tmp_path, source, error, message):
    with pytest.raises(error, match=message) as caught:
        loader.load(source.write(tmp_path / "bad.gguf"), "float32")
    assert "bad.gguf" in str(caught.value)


def test_part_of_a_split_file(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(NotImplementedError, match="part.gguf is one part of a split GGUF"):
        loader.load(tmp_path / "part.gguf", "float32")


def test_other_parameter_dtype(tmp_path):
    with pytest.raises(ValueError, match="dtype=float16.*float32 or bfloat16"):
        loader.load(Checkpoint().write(tmp_path / "model.gguf"), "float16")


def test_what_a_file_may_leave_out(tmp_path):
    """llama.cpp's defaults: as many kv heads as query heads, and RoPE's base of 10,000."""
    checkpoint = Checkpoint()
    del checkpoint.metadata["attention.head_count_kv"], checkpoint.metadata["rope.freq_base"]
    for layer in range(L):
        for name in ("attn_k", "attn_v"):
            checkpoint.tensors[f"blk.{layer}.{name}.weight"] = checkpoint.tensors[f"blk.{layer}.attn_q.weight"]
    config = loader.load(checkpoint.write(tmp_path / "model.gguf"), "float32")[0]
    assert (config.kv_heads, config.rope_theta) == (N, 10_000)
