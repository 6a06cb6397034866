"""Retention gates: what they compute, their files, and how `retention.load` puts model and gates together."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import retention
from retention import gates
from retention.checkpoints import gates as gates_file
from retention.gates import GateConfig
from tests.conftest import small_config

CONFIG = small_config()
L, E, H, R = CONFIG.layers, CONFIG.embed_dim, CONFIG.kv_heads, 16
KINDS = {
    "global": GateConfig(width=R),
    "local": GateConfig("local", width=R),
    "tied": GateConfig(width=R, tie_heads=True),
    "linear": GateConfig("linear", width=R),
}
kinds = pytest.mark.parametrize("gate", KINDS.values(), ids=KINDS.keys())


def spread(gate, seed=0):
    """Gate parameters that are all different, so that no mix-up of layers or heads goes unseen."""
    params = gates.init(CONFIG, gate, seed)
    keys = jax.random.split(jax.random.key(seed), len(params))
    return {name: 0.5 * jax.random.normal(key, leaf.shape) for key, (name, leaf) in zip(keys, params.items(), strict=True)}


def slices(params, gate):
    """One layer's arrays at a time, as the scan over layers hands them out."""
    stacked = gates.per_layer(params, CONFIG, gate)
    return [{name: leaf[layer] for name, leaf in stacked.items()} for layer in range(L)]


def by_hand(params, gate, layer, h):
    """METHOD section 2 in float64."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}

    def silu(x):
        return x / (1 + np.exp(-x))

    hidden = np.asarray(h, np.float64)
    if gate.kind != "linear":
        hidden = silu(hidden @ p["w1"][layer] + p["b1"][layer])
    if gate.kind == "global":
        hidden = silu(hidden @ p["w2"][layer] + p["b2"][layer])
        score = hidden @ p["readout"] + p["bias"]
    else:
        score = hidden @ p["readout"][layer] + p["bias"][layer]
    return np.broadcast_to(-np.logaddexp(0, -score), (*h.shape[:2], H))


@pytest.mark.parametrize(
    "name, shapes",
    [
        ("global", dict(w1=(L, E, R), b1=(L, R), w2=(L, R, R), b2=(L, R), readout=(R, H), bias=(H,))),
        ("tied", dict(w1=(L, E, R), b1=(L, R), w2=(L, R, R), b2=(L, R), readout=(R, 1), bias=(1,))),
        ("local", dict(w1=(L, E, R), b1=(L, R), readout=(L, R, H), bias=(L, H))),
        ("linear", dict(readout=(L, E, H), bias=(L, H))),
    ],
)
def test_shapes_and_start(name, shapes):
    params = gates.init(CONFIG, KINDS[name])
    assert {name: leaf.shape for name, leaf in params.items()} == shapes
    assert {leaf.dtype for leaf in params.values()} == {np.dtype("float32")}
    assert (params["bias"] == 18).all() and all((params[name] == 0).all() for name in ("b1", "b2") if name in params)
    other = gates.init(CONFIG, KINDS[name], seed=1)
    for weight in {"w1", "w2", "readout"} & params.keys():
        np.testing.assert_allclose(params[weight].std(), 0.02, rtol=0.3)
        assert not np.array_equal(params[weight], other[weight])


def test_given_the_inputs_rms_every_layer_starts_at_unit_scale():
    rms = jnp.array([0.05, 0.4, 2.0])
    params = gates.init(small_config(embed_dim=256), GateConfig(width=64), input_rms=rms)
    h = rms[:, None, None] * jax.random.normal(jax.random.key(1), (L, 500, 256))
    np.testing.assert_allclose(jnp.einsum("LTE,LER->LTR", h, params["w1"]).std(axis=(1, 2)), 1.0, rtol=0.1)
    linear = gates.init(small_config(embed_dim=256), GateConfig("linear"), input_rms=rms)
    np.testing.assert_allclose(jnp.einsum("LTE,LEH->LTH", h, linear["readout"]).std(axis=(1, 2)), 0.02 * 256**0.5, rtol=0.2)


def test_a_bias_may_be_a_whole_number():
    assert gates.init(CONFIG, GateConfig(width=R, bias=8))["bias"].dtype == np.float32


@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_beta(gate, dtype):
    params, h = spread(gate), jax.random.normal(jax.random.key(5), (2, 7, E)).astype(dtype)
    found = []
    for layer, arrays in enumerate(slices(params, gate)):
        out = gates.log_beta(arrays, h, H)
        assert out.shape == (2, 7, H) and out.dtype == jnp.float32
        assert (out <= 0).all()
        # To float32's accuracy with bfloat16 inputs too: only the input is rounded, nothing behind it.
        np.testing.assert_allclose(out, by_hand(params, gate, layer, h), rtol=1e-5, atol=1e-5)
        found.append(np.asarray(out))
    assert not np.allclose(found[0], found[1])
    assert (found[0][..., 0] == found[0][..., 1]).all() == gate.tie_heads


@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bias_of_18_starts_as_the_full_cache(gate, dtype):
    """beta = 1 - 1.5e-8. In bfloat16, which steps by 0.125 at 18, the readout's small differences would be lost."""
    for arrays in slices(gates.init(CONFIG, gate), gate):
        np.testing.assert_allclose(gates.log_beta(arrays, jnp.zeros((1, 1, E), dtype), H), -1.523e-8, rtol=1e-3)
        near = gates.log_beta(arrays, jax.random.normal(jax.random.key(0), (1, 50, E)).astype(dtype), H)
        least, most = (1e-8, 2.3e-8) if gate.kind == "linear" else (1.3e-8, 1.8e-8)  # without a trunk the readout sees inputs of unit scale
        assert ((near < -least) & (near > -most)).all()
        assert len(np.unique(near)) > 1, "the gates see their input from the start"


def test_per_layer_gives_every_layer_the_same_readout():
    for gate in KINDS.values():
        params = spread(gate)
        stacked = gates.per_layer(params, CONFIG, gate)
        assert {leaf.shape[0] for leaf in stacked.values()} == {L}
        for name, leaf in stacked.items():
            shared = gate.kind == "global" and name in ("readout", "bias")
            np.testing.assert_array_equal(leaf, np.stack([params[name]] * L) if shared else params[name])


@kinds
def test_gradients_of_the_shared_readout_sum_over_layers(gate):
    params, h = spread(gate), jax.random.normal(jax.random.key(5), (L, 1, 7, E))
    weight = jax.random.normal(jax.random.key(6), (L, 1, 7, H))

    def loss(params):
        stacked = gates.per_layer(params, CONFIG, gate)
        _, out = jax.lax.scan(lambda carry, x: (carry, gates.log_beta(x[0], x[1], H)), None, (stacked, h))
        return jnp.sum(weight * out)

    def one(params, layer):
        return jnp.sum(weight[layer] * gates.log_beta(slices(params, gate)[layer], h[layer], H))

    whole, alone = jax.grad(loss)(params), [jax.grad(one)(params, layer) for layer in range(L)]
    for name, leaf in whole.items():
        assert np.abs(leaf).max() > 0
        np.testing.assert_allclose(leaf, sum(np.asarray(g[name]) for g in alone), rtol=1e-4, atol=1e-5)
    if gate.kind == "global":
        assert all(np.abs(g["readout"]).max() > 0 for g in alone), "every layer trains the readout"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kind="globe"), "must be 'global', 'local' or 'linear', got 'globe'"),
        (dict(kind="local", tie_heads=True), "tie_heads belongs to the global gate; a local gate"),
        (dict(kind="linear", tie_heads=True), "tie_heads belongs to the global gate; a linear gate"),
        (dict(width=0), "gate width must be a whole number of at least 1, got 0"),
        (dict(width=True), "gate width must be a whole number of at least 1, got True"),
        (dict(width=1.5), "gate width must be a whole number of at least 1, got 1.5"),
        (dict(sinks=-1), "gate sinks must be a whole number of at least 0, got -1"),
        (dict(bias="8"), "gate bias must be a number, got '8'"),
        (dict(bias=float("inf")), "gate bias must be a number, got inf"),
    ],
)
def test_a_config_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GateConfig(**arguments)


# Files.


@pytest.fixture
def saved(tmp_path):
    trained = gates.TrainedGates(GateConfig(width=R, bias=3.5, sinks=1), spread(KINDS["global"]), {"model": "small", "steps": 7, "data": ["a", "b"]})
    gates_file.save(tmp_path / "gates.safetensors", trained)
    return tmp_path / "gates.safetensors", trained


@kinds
def test_round_trip(tmp_path, gate):
    gate = dataclasses.replace(gate, bias=3.5, sinks=1)
    trained = gates.TrainedGates(gate, spread(gate), {"model": "small", "steps": 7, "data": ["a", "b"], "loss": 0.1, "note": 'a "quoted" ü'})
    gates_file.save(tmp_path / "gates.safetensors", trained)
    found = gates_file.load(str(tmp_path / "gates.safetensors"), CONFIG)
    assert found.config == gate and found.record == trained.record
    assert found.params.keys() == trained.params.keys()
    for name, leaf in found.params.items():
        assert isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, trained.params[name])


def test_gates_are_float32_whatever_the_file_holds(saved):
    path, trained = saved
    arrays = {name: np.asarray(leaf, np.float16) for name, leaf in trained.params.items()}
    gates_file.save(path, dataclasses.replace(trained, params=arrays))
    for name, leaf in gates_file.load(path, CONFIG).params.items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, arrays[name])


def one_sentence(caught, *parts):
    message = str(caught.value)
    assert all(str(part) in message for part in parts), message
    assert "\n" not in message and "Traceback" not in message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gates_that_are_not_finite(saved, value):
    path, trained = saved
    gates_file.save(path, dataclasses.replace(trained, params=trained.params | {"w2": trained.params["w2"].at[1, 2, 3].set(value)}))
    with pytest.raises(ValueError) as caught:
        gates_file.load(path, CONFIG)
    one_sentence(caught, path, "NaN or infinity in 'w2'", "train them again or use another file")


@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(layers=5), ["b1 is (3, 16), this model needs (5, 16)"]),
        (dict(embed_dim=64), ["w1 is (3, 32, 16), this model needs (3, 64, 16)"]),
        (dict(kv_heads=4), ["bias is (2,), this model needs (4,)"]),
    ],
)
def test_gates_for_another_model(saved, changes, parts):
    path, _ = saved
    with pytest.raises(ValueError) as caught:
        gates_file.load(path, small_config(**changes))
    one_sentence(caught, path, "are for another model", *parts)


def test_gates_that_lack_an_array_or_have_one_too_many(saved):
    path, trained = saved
    for params, part in (
        ({name: leaf for name, leaf in trained.params.items() if name != "b2"}, "b2 is missing"),
        (trained.params | {"w3": np.zeros(2, np.float32)}, "w3 is (2,), this model needs no such array"),
    ):
        gates_file.save(path, dataclasses.replace(trained, params=params))
        with pytest.raises(ValueError) as caught:
            gates_file.load(path, CONFIG)
        one_sentence(caught, path, part)


def test_files_that_are_no_gates(saved, tmp_path):
    path, trained = saved
    arrays = {name: np.asarray(leaf) for name, leaf in trained.params.items()}
    gate, record = json.dumps(dataclasses.asdict(trained.config)), json.dumps({})
    other = tmp_path / "other.safetensors"

    def text():
        other.write_text("not a safetensors file at all")

    writers = [
        text,
        lambda: other.write_bytes(b""),
        lambda: safetensors.numpy.save_file(arrays, other),
        lambda: safetensors.numpy.save_file(arrays, other, {"format": "pt"}),
        lambda: safetensors.numpy.save_file(arrays, other, {"gate": gate}),
        lambda: safetensors.numpy.save_file(arrays, other, {"gate": "{", "record": record}),
        lambda: safetensors.numpy.save_file(arrays, other, {"gate": "[1]", "record": record}),
        lambda: safetensors.numpy.save_file(arrays, other, {"gate": '{"depth": 3}', "record": record}),
        # Damage: cut short in the data, cut short in the header, a header length that is nonsense.
        lambda: other.write_bytes(path.read_bytes()[:-100]),
        lambda: other.write_bytes(path.read_bytes()[:50]),
        lambda: other.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    ]
    for write in writers:
        write()
        with pytest.raises(ValueError) as caught:
            gates_file.load(other, CONFIG)
        one_sentence(caught, other, "is not a gates file", "or it is damaged")


def test_a_missing_file(tmp_path):
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            gates_file.load(path, CONFIG)
        one_sentence(caught, f"there is no gates file {path}")


# The one door.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """CONFIG's random model as a Hugging Face folder, with a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("tiny")
    random = np.random.default_rng(0)

    def matrix(*shape):
        return random.standard_normal(shape).astype(np.float32)

    queries, keys = CONFIG.query_heads * CONFIG.head_dim, CONFIG.kv_heads * CONFIG.head_dim
    tensors = {"model.embed_tokens.weight": matrix(CONFIG.vocab_size, E), "model.norm.weight": matrix(E)}
    for layer in range(L):
        shapes = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (E,))
        shapes |= {"self_attn.q_proj": (queries, E), "self_attn.k_proj": (keys, E), "self_attn.v_proj": (keys, E), "self_attn.o_proj": (E, queries)}
        shapes |= {"mlp.gate_proj": (CONFIG.mlp_dim, E), "mlp.up_proj": (CONFIG.mlp_dim, E), "mlp.down_proj": (E, CONFIG.mlp_dim)}
        tensors |= {f"model.layers.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    entries = dict(
        model_type="llama", vocab_size=CONFIG.vocab_size, num_hidden_layers=L, hidden_size=E, intermediate_size=CONFIG.mlp_dim,
        num_attention_heads=CONFIG.query_heads, num_key_value_heads=H, head_dim=CONFIG.head_dim, max_position_embeddings=CONFIG.max_positions,
        rms_norm_eps=CONFIG.norm_eps, tie_word_embeddings=True,
    )
    (folder / "config.json").write_text(json.dumps(entries))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_load_puts_model_tokenizer_and_gates_together(folder, saved):
    path, trained = saved
    model = retention.load(folder, gates=path)
    assert model.config == dataclasses.replace(CONFIG, tie_embeddings=True)
    assert model.tokenizer.encode("two one three") == [2, 1, 0]
    assert model.gates.config == trained.config
    np.testing.assert_array_equal(model.gates.params["w1"], trained.params["w1"])
    assert model.logits([[1, 2]]).shape == (1, 2, CONFIG.vocab_size)
    assert retention.load(str(folder), gates=None).gates is None
    rounded = retention.load(str(folder), gates=str(path), dtype="bfloat16")
    assert rounded.params["embed"].dtype == jnp.bfloat16 and rounded.gates.params["w1"].dtype == jnp.float32


def test_load_refuses_an_unknown_name():
    with pytest.raises(FileNotFoundError) as caught:
        retention.load("smollm3")
    one_sentence(caught, "no model 'smollm3'", "'smollm2-135m', a .gguf file or a Hugging Face folder")


def test_load_says_which_models_have_shipped_gates(folder):
    with pytest.raises(ValueError) as caught:
        retention.load(str(folder), gates="shipped")
    one_sentence(caught, "gates='shipped' exist for: ", repr(str(folder)), "give the path of trained gates, or None")


def test_shipped_gates_are_those_of_the_package_alone(folder, saved):
    path, _ = saved
    beside = folder.with_name(f"{folder.name}.safetensors")
    beside.write_bytes(path.read_bytes())
    try:
        with pytest.raises(ValueError, match="gates='shipped' exist for"):
            retention.load(str(folder), gates="shipped")
    finally:
        beside.unlink()


def test_load_without_gates(folder):
    assert all(retention.load(folder, gates=none).gates is None for none in (None, "none", "None"))


def test_load_refuses_what_does_not_fit(folder, saved, tmp_path):
    path, trained = saved
    with pytest.raises(FileNotFoundError) as caught:
        retention.load(folder, gates=str(tmp_path / "absent.safetensors"))
    one_sentence(caught, "there is no gates file", tmp_path / "absent.safetensors")
    gates_file.save(path, dataclasses.replace(trained, params=gates.init(small_config(layers=5), trained.config)))
    with pytest.raises(ValueError) as caught:
        retention.load(folder, gates=path)
    one_sentence(caught, path, "are for another model")
    with pytest.raises(ValueError) as caught:
        retention.load(folder, dtype="float16")
    one_sentence(caught, "dtype must be 'float32' or 'bfloat16', got 'float16'")
    with pytest.raises(FileNotFoundError) as caught:
        retention.load(tmp_path)
    one_sentence(caught, "there is no config.json in", tmp_path)


@pytest.mark.parametrize("shape", [(3,), (1, 0), (1, 2, 3)])
def test_logits_want_a_batch_of_tokens(folder, shape):
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\] with T > 0"):
        retention.load(folder).logits(np.zeros(shape, int))


def test_a_trunk_that_starts_from_the_data_has_one_scale():
    params = gates.init(small_config(embed_dim=256), gates.GateConfig(width=64), input_rms=jnp.array([0.5, 1.0, 2.0]))
    np.testing.assert_allclose(params["w1"].std(axis=(1, 2)), [2 / 16, 1 / 16, 0.5 / 16], rtol=0.05)
    np.testing.assert_allclose(params["w2"].std(axis=(1, 2)), 1.5 / 8, rtol=0.1)
    assert gates.GateConfig().width == 512
