"""Small random models written as Hugging Face folders and read back."""

import json
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from retention.checkpoints.huggingface import load
from retention.model import RopeScaling

L, E, F, V, N, H = 2, 32, 48, 40, 4, 2


def entries(model_type="llama", head_dim=8, tied=False):
    """config.json, as transformers 4 writes it."""
    found = {
        "model_type": model_type,
        "vocab_size": V,
        "num_hidden_layers": L,
        "hidden_size": E,
        "intermediate_size": F,
        "num_attention_heads": N,
        "num_key_value_heads": H,
        "max_position_embeddings": 128,
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "rope_scaling": None,
    }
    return found if head_dim == E // N else found | {"head_dim": head_dim}


def weights(model_type="llama", head_dim=8, tied=False, embed=E, mlp=F):
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    tensors = {"model.embed_tokens.weight": normal(V, embed), "model.norm.weight": normal(embed)}
    if not tied:
        tensors["lm_head.weight"] = normal(V, embed)
    for layer in range(L):
        shapes = {
            "input_layernorm.weight": [embed],
            "self_attn.q_proj.weight": [N * head_dim, embed],
            "self_attn.k_proj.weight": [H * head_dim, embed],
            "self_attn.v_proj.weight": [H * head_dim, embed],
            "self_attn.o_proj.weight": [embed, N * head_dim],
            "post_attention_layernorm.weight": [embed],
            "mlp.gate_proj.weight": [mlp, embed],
            "mlp.up_proj.weight": [mlp, embed],
            "mlp.down_proj.weight": [embed, mlp],
        }
        if model_type == "qwen2":
            for letter, heads in (("q", N), ("k", H), ("v", H)):
                shapes[f"self_attn.{letter}_proj.bias"] = [heads * head_dim]
        if model_type == "qwen3":
            shapes |= {"self_attn.q_norm.weight": [head_dim], "self_attn.k_norm.weight": [head_dim]}
        tensors |= {f"model.layers.{layer}.{name}": normal(*shape) for name, shape in shapes.items()}
    return tensors


def expected(tensors):
    """The parameters that these tensors stand for."""

    def stacked(name):
        return np.stack([tensors[f"model.layers.{layer}.{name}"].T for layer in range(L)])

    layers = {
        "attention_norm": stacked("input_layernorm.weight"),
        "mlp_norm": stacked("post_attention_layernorm.weight"),
        "gate": stacked("mlp.gate_proj.weight"),
        "up": stacked("mlp.up_proj.weight"),
        "down": stacked("mlp.down_proj.weight"),
        **{letter: stacked(f"self_attn.{letter}_proj.weight") for letter in "qkvo"},
    }
    if "model.layers.0.self_attn.q_proj.bias" in tensors:
        layers |= {f"{letter}_bias": stacked(f"self_attn.{letter}_proj.bias") for letter in "qkv"}
    if "model.layers.0.self_attn.q_norm.weight" in tensors:
        layers |= {"q_norm": stacked("self_attn.q_norm.weight"), "k_norm": stacked("self_attn.k_norm.weight")}
    params = {"embed": tensors["model.embed_tokens.weight"], "norm": tensors["model.norm.weight"], "layers": layers}
    if "lm_head.weight" in tensors:
        params["head"] = tensors["lm_head.weight"].T
    return params


def write(folder, config, tensors):
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_same(params, wanted):
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, params, wanted)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("model_type", "head_dim"), [("llama", 8), ("qwen2", 8), ("qwen3", 16)])
def test_parameters_are_exact(tmp_path, model_type, head_dim, tied):
    tensors = weights(model_type, head_dim, tied)
    config, params = load(write(tmp_path, entries(model_type, head_dim, tied), tensors), "float32")
    assert (config.vocab_size, config.layers, config.embed_dim, config.mlp_dim) == (V, L, E, F)
    assert (config.query_heads, config.kv_heads, config.head_dim, config.max_positions) == (N, H, head_dim, 128)
    assert (config.rope_theta, config.rope_scaling, config.norm_eps) == (5000.0, None, 1e-5)
    assert (config.tie_embeddings, config.qkv_bias, config.qk_norm) == (tied, model_type == "qwen2", model_type == "qwen3")
    assert_same(params, expected(tensors))


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(tmp_path, stored, dtype):
    tensors = {name: tensor.astype(stored) for name, tensor in weights("qwen2").items()}
    _, params = load(write(tmp_path, entries("qwen2"), tensors), dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert_same(params, jax.tree.map(lambda leaf: leaf.astype(dtype), expected(tensors)))


def shard(folder, tensors):
    weight_map = {}
    for number in range(3):
        part = {name: tensors[name] for name in list(tensors)[number::3]}
        file = f"model-{number + 1:05}-of-00003.safetensors"
        safetensors.numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(tmp_path):
    tensors = weights()
    (tmp_path / "config.json").write_text(json.dumps(entries()))
    shard(tmp_path, tensors)
    assert_same(load(tmp_path, "float32")[1], expected(tensors))

    whole = {name: 2 * tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(whole, tmp_path / "model.safetensors")
    assert_same(load(tmp_path, "float32")[1], expected(whole))  # and not an older index's
    (tmp_path / "model.safetensors").unlink()

    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors, named by model.safetensors.index.json, is missing"):
        load(tmp_path, "float32")
    for content in ("{}", '{"weight_map": {"x": 1}}', "[]", "{"):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match="model.safetensors.index.json"):
            load(tmp_path, "float32")


def test_memory_beside_the_parameters_is_one_stacked_parameter(tmp_path):
    embed, mlp = 512, 1024
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in weights(head_dim=embed // N, embed=embed, mlp=mlp).items()}
    write(tmp_path, entries() | {"hidden_size": embed, "intermediate_size": mlp}, tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    load(tmp_path, "bfloat16")  # what is imported and compiled once does not count
    # This counts numpy's memory. The parameters themselves are jax's.
    tracemalloc.start()
    try:
        _, params = load(tmp_path, "bfloat16")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == total
    assert peak < 1.3 * params["layers"]["up"].nbytes < 0.4 * total


def test_place(tmp_path):
    """Each parameter is put, once, where it is said to lie."""
    tensors, asked = weights(), []
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("only",))

    def place(config, name):
        assert config.layers == L
        asked.append(name)
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("only" if name == "embed" else None))

    folder = write(tmp_path, entries(), tensors)
    params = load(folder, "float32", place)[1]
    assert_same(params, expected(tensors))
    assert sorted(asked) == sorted(path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params))
    assert all(leaf.sharding == place(load(folder)[0], path[-1].key) for path, leaf in jax.tree_util.tree_leaves_with_path(params))


FAST = {"beta_fast": 16.0, "attention_factor": 1.5}
YARN = {"factor": 4.0, "original_max_position_embeddings": 100}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("kind", "rope", "wanted", "max_positions"),
    [
        ("default", {}, None, 128),
        ("linear", {"factor": 2.0}, RopeScaling("linear", 2.0, 128), 128),
        ("llama3", LLAMA3, RopeScaling("llama3", 8.0, 16, 1.0, 4.0), 128),
        ("yarn", YARN, RopeScaling("yarn", 4.0, 100), 400),
        ("yarn", YARN | FAST, RopeScaling("yarn", 4.0, 100, **FAST), 400),
        ("yarn", {"factor": 2.0}, RopeScaling("yarn", 2.0, 128), 256),
    ],
)
def test_rope_scaling_of_transformers_4_and_5(tmp_path, kind, rope, wanted, max_positions):
    version4 = entries() | {"rope_scaling": {"rope_type": kind} | rope}
    oldest = entries() | {"rope_scaling": {"type": kind} | rope}
    version5 = entries() | {"rope_parameters": {"rope_theta": 5000.0, "rope_type": kind} | rope, "dtype": "float32"}
    del version5["rope_theta"], version5["rope_scaling"]
    for config in (version4, oldest, version5):
        found, _ = load(write(tmp_path, config, weights()), "float32")
        assert (found.rope_theta, found.rope_scaling, found.max_positions) == (5000.0, wanted, max_positions)


def test_positions_before_scaling_that_stand_outside_of_it(tmp_path):
    """They go first, as in transformers."""
    for rope in ({"factor": 2.0}, {"factor": 2.0, "original_max_position_embeddings": 100}):
        config = entries() | {"original_max_position_embeddings": 64, "rope_scaling": {"type": "yarn"} | rope}
        assert load(write(tmp_path, config, weights()))[0].rope_scaling == RopeScaling("yarn", 2.0, 64)


def test_rope_scaling_beside_rope_parameters(tmp_path):
    """Nothing is ignored: the two may stand together if they say the same."""
    yarn, parameters = {"type": "yarn"} | YARN, {"rope_theta": 7000.0, "rope_type": "yarn"} | YARN
    found, _ = load(write(tmp_path, entries() | {"rope_parameters": parameters, "rope_scaling": yarn}, weights()))
    assert (found.rope_theta, found.rope_scaling) == (7000.0, RopeScaling("yarn", 4.0, 100))
    for other in ({"rope_theta": 7000.0, "rope_type": "default"}, parameters | {"factor": 2.0}, parameters):
        differs = yarn | ({"rope_theta": 5000.0} if other is parameters else {})
        with pytest.raises(ValueError, match="config.json has a rope_scaling that differs from its rope_parameters.*take one of the two out"):
            load(write(tmp_path, entries() | {"rope_parameters": other, "rope_scaling": differs}, weights()))


def test_a_head_that_only_the_configuration_calls_tied(tmp_path):
    """A file's own head is used; one that is the embedding once more is not kept twice."""
    tensors = weights(tied=False)
    config, params = load(write(tmp_path, entries(tied=True), tensors))
    assert not config.tie_embeddings
    assert_same(params, expected(tensors))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    config, params = load(write(tmp_path, entries(tied=True), tensors))
    assert config.tie_embeddings and "head" not in params


@pytest.mark.parametrize("name", ["0.self_attn.q_proj.bias", "1.self_attn.q_norm.weight", "1.self_attn.k_norm.weight", "2.input_layernorm.weight"])
def test_parameters_that_the_model_has_not(tmp_path, name):
    with pytest.raises(NotImplementedError, match=f"has biases or norms that a model of its configuration has not, such as model.layers.{name}"):
        load(write(tmp_path, entries(), weights() | {f"model.layers.{name}": np.ones(8, np.float32)}))


def test_tables_that_transformers_once_saved_change_nothing(tmp_path):
    tensors = weights()
    old = tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert_same(load(write(tmp_path, entries(), old))[1], expected(tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_key_value_heads": 3}, "query heads must be a multiple of its kv heads, got 4 and 3"), ({"head_dim": 7}, "even dimension.*got 7")],
)
def test_heads_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, entries() | change, weights()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "mamba"}, NotImplementedError, "'mamba'; supported are llama, qwen2, qwen3"),
        ({"model_type": None}, ValueError, "has no model_type"),
        ({"attention_bias": True}, NotImplementedError, "attention_bias"),
        ({"mlp_bias": True}, NotImplementedError, "mlp_bias"),
        ({"use_sliding_window": True}, NotImplementedError, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, NotImplementedError, "layers of type 'sliding_attention'"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, NotImplementedError, "layers of type 'chunked_attention'"),
        ({"layer_types": 3}, NotImplementedError, "layers of type 3"),
        ({"hidden_act": "gelu"}, NotImplementedError, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, NotImplementedError, "quantization_config"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, NotImplementedError, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, NotImplementedError, "'dynamic'; supported are default, linear, llama3, yarn"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, NotImplementedError, "'longrope'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}}, NotImplementedError, "'mscale'"),
        ({"rope_scaling": {"type": "linear"}}, ValueError, "no factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}}, ValueError, "no low_freq_factor"),
        ({"rope_scaling": {"type": ["yarn"], "factor": 8.0}}, NotImplementedError, r"\['yarn'\]"),
        ({"original_max_position_embeddings": "64", "rope_scaling": {"type": "yarn", "factor": 2.0}}, ValueError, "original_max_position_embeddings = '64'"),
        ({"hidden_size": None}, ValueError, "has no hidden_size"),
        ({"partial_rotary_factor": 0.5}, NotImplementedError, "partial_rotary_factor"),
        ({"rope_scaling": {"factor": 2.0}}, NotImplementedError, "'factor' for rope scaling of type 'default'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}}, NotImplementedError, "'full_attention'"),
        ({"rope_scaling": "yarn"}, ValueError, "rope_scaling = 'yarn', which must be an object such as"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ValueError, "factor = '2' in its rope_scaling, which must be a number above 0"),
        ({"rope_parameters": {"rope_theta": -1}}, ValueError, "rope_theta = -1 in its rope_parameters"),
        ({"rope_theta": "5000"}, ValueError, "rope_theta = '5000', which must be a number above 0"),
        ({"rms_norm_eps": True}, ValueError, "rms_norm_eps = True, which must be a number above 0"),
        ({"max_position_embeddings": "4096"}, ValueError, "max_position_embeddings = '4096', which must be a whole number of at least 1"),
        ({"num_attention_heads": 0}, ValueError, "num_attention_heads = 0, which must be a whole number of at least 1"),
        ({"num_hidden_layers": 2.0}, ValueError, "num_hidden_layers = 2.0, which must be a whole number"),
    ],
)
def test_configurations_refused(tmp_path, change, error, message):
    with pytest.raises(error, match=message) as caught:
        load(write(tmp_path, entries() | change, weights()), "float32")
    assert "config.json" in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*absent"):
        load(tmp_path / "absent", "float32")
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        load(tmp_path, "float32")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load(tmp_path, "float32")
    (tmp_path / "config.json").write_text("3")
    with pytest.raises(ValueError, match="config.json holds no JSON object"):
        load(tmp_path, "float32")
    (tmp_path / "config.json").write_text(json.dumps(entries()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no model.safetensors .*only safetensors"):
        load(tmp_path, "float32")


def test_truncated_anywhere(tmp_path):
    write(tmp_path, entries(), weights())
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for length in [*range(0, 16), *range(16, len(whole), 997), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="model.safetensors is truncated"):
            load(tmp_path, "float32")


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe{}",
        b"[]",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [2]}}',
        b'{"x": {"dtype": "F32", "shape": null, "data_offsets": [0, 8]}}',
    ],
)
def test_corrupt_header(tmp_path, header):
    write(tmp_path, entries(), weights())
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(ValueError, match="model.safetensors is corrupt or no safetensors file"):
        load(tmp_path, "float32")


def test_corrupt_entry_and_unsupported_dtype(tmp_path):
    write(tmp_path, entries(), weights())
    size = r"tensor x has 8 bytes, which is not F32 of shape \[3\]"
    for kind, error, message in (("F32", ValueError, size), ("F8_E4M3", NotImplementedError, "F8_E4M3")):
        header = json.dumps({"x": {"dtype": kind, "shape": [3], "data_offsets": [0, 8]}}).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        with pytest.raises(error, match=message):
            load(tmp_path, "float32")


def test_missing_or_misshapen_tensor(tmp_path):
    tensors = weights("qwen2")
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.k_proj.bias"):
        write(tmp_path, entries("qwen2"), {key: value for key, value in tensors.items() if key != name})
        with pytest.raises(ValueError, match=f"{tmp_path} has no tensor {name}"):
            load(tmp_path, "float32")
    name = "model.layers.1.mlp.down_proj.weight"
    write(tmp_path, entries("qwen2"), tensors | {name: np.zeros((E, F + 1), np.float32)})
    with pytest.raises(ValueError, match=rf"{name} of .* has shape \[32, 49\], but its configuration implies \[32, 48\]"):
        load(tmp_path, "float32")


def test_what_a_config_may_leave_out(tmp_path):
    """Defaults of transformers' LlamaConfig."""
    given, tensors = entries(), weights()
    for key in ("num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings"):
        del given[key]
    for layer in range(L):
        for letter in "kv":
            tensors[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] = tensors[f"model.layers.{layer}.self_attn.q_proj.weight"]
    config, _ = load(write(tmp_path, given, tensors), "float32")
    assert (config.kv_heads, config.rope_theta, config.norm_eps, config.tie_embeddings) == (N, 10_000, 1e-6, False)
