"""The decoder: RoPE and its stretchings by hand, causality, and parity with transformers (marked `compare`)."""

import collections
import dataclasses
import math
import pydoc_data.topics
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from retention import model
from retention.checkpoints import download, gguf, huggingface
from retention.checkpoints.tokenizer import Tokenizer
from retention.model import RopeScaling
from tests.conftest import small_config, small_model

# RoPE.


def frequencies(**changes):
    frequency, factor = model.rope_frequencies(small_config(**changes))
    return np.asarray(frequency), factor


def test_plain_frequencies():
    frequency, factor = frequencies(head_dim=8, rope_theta=10_000.0)
    np.testing.assert_allclose(frequency, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    assert frequency.dtype == np.float32 and factor == 1.0


def test_linear_scaling_divides_every_frequency():
    frequency, factor = frequencies(head_dim=8, rope_theta=10_000.0, rope_scaling=RopeScaling("linear", 4.0))
    np.testing.assert_allclose(frequency, [0.25, 0.025, 0.0025, 0.00025], rtol=1e-6)
    assert factor == 1.0


def test_llama3_scaling():
    """theta 100 and D 8: frequencies 1, .316, .1, .0316, which turn 20.4, 6.44, 2.04, .644 times over 128 positions.

    Above 4 turns a wave stays, below 1 it is stretched by the factor, and between: 2.037 turns are (2.037 - 1) / 3 = .3457 of the way.
    """
    scaling = RopeScaling("llama3", 8.0, original_max_positions=128, low_freq_factor=1.0, high_freq_factor=4.0)
    frequency, factor = frequencies(head_dim=8, rope_theta=100.0, rope_scaling=scaling)
    keep = (128 * 0.1 / (2 * math.pi) - 1) / 3
    np.testing.assert_allclose(keep, 0.3457, atol=1e-4)
    np.testing.assert_allclose(frequency, [1.0, 100**-0.25, keep * 0.1 + (1 - keep) * 0.1 / 8, 100**-0.75 / 8], rtol=1e-5)
    assert factor == 1.0


def test_yarn_scaling():
    """D 16, theta 10,000, 512 positions: a wave turns 8 times at dimension 2.02 and once at 3.82 (of 8), so the ramp runs from 2 to 4."""
    scaling = RopeScaling("yarn", 4.0, original_max_positions=512, beta_fast=8.0, beta_slow=1.0)
    frequency, factor = frequencies(head_dim=16, rope_theta=10_000.0, rope_scaling=scaling)
    plain = 10_000.0 ** (-np.arange(8) / 8)
    for turns, dimension in ((8, 2.016), (1, 3.822)):
        np.testing.assert_allclose(512 * 10_000 ** (-dimension / 8) / (2 * math.pi), turns, rtol=1e-3)
    stretched = np.array([0, 0, 0, 0.5, 1, 1, 1, 1])
    np.testing.assert_allclose(frequency, plain * (1 - stretched) + plain / 4 * stretched, rtol=1e-5)
    np.testing.assert_allclose(factor, 0.1 * math.log(4) + 1)
    assert frequencies(rope_scaling=dataclasses.replace(scaling, attention_factor=1.25))[1] == 1.25
    assert frequencies(rope_scaling=dataclasses.replace(scaling, factor=1.0))[1] == 1.0


def test_an_unknown_scaling_is_refused():
    with pytest.raises(NotImplementedError, match="rope_scaling.kind 'ntk' is not supported; linear, llama3 and yarn are"):
        frequencies(rope_scaling=RopeScaling("ntk", 2.0))


def test_rope_rotates_halves_by_hand():
    x = np.array([1.0, 2.0, 3.0, 4.0], np.float32).reshape(1, 1, 1, 4)
    angle = np.array([0.3, 0.7])
    c, s = np.cos(angle), np.sin(angle)
    found = model.apply_rope(jnp.asarray(x), jnp.asarray(c, jnp.float32)[None, None], jnp.asarray(s, jnp.float32)[None, None])
    # Dimension i turns with dimension i + D/2, not with its neighbour.
    expected = [1 * c[0] - 3 * s[0], 2 * c[1] - 4 * s[1], 3 * c[0] + 1 * s[0], 4 * c[1] + 2 * s[1]]
    np.testing.assert_allclose(found[0, 0, 0], expected, rtol=1e-6)


def test_rms_norm():
    x = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    weight = np.arange(1, 6, dtype=np.float32)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + 0.5) * weight
    np.testing.assert_allclose(model.rms_norm(jnp.asarray(x), weight, 0.5), expected, rtol=1e-5)
    assert model.rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16), 0.5).dtype == jnp.bfloat16


# The whole decoder.


def test_logits_are_causal(small):
    tokens = np.random.default_rng(0).integers(0, 61, (2, 40))
    logits = np.asarray(small.logits(tokens))
    assert logits.shape == (2, 40, 61) and logits.dtype == np.float32
    changed = tokens.copy()
    changed[0, 25] = (tokens[0, 25] + 1) % 61
    other = np.asarray(small.logits(changed))
    np.testing.assert_array_equal(logits[0, :25], other[0, :25])
    np.testing.assert_array_equal(logits[1], other[1])
    assert (np.abs(logits[0, 25:] - other[0, 25:]).max(axis=-1) > 1e-4).all(), "every later token sees the change"


@pytest.mark.parametrize(
    "tokens, message",
    [(np.zeros((0, 3), int), r"\[B, T\] with T > 0 and B > 0, got shape \(0, 3\)"), ([[0.5]], "whole numbers, .*got float32")],
)
def test_logits_of_what_are_no_tokens(small, tokens, message):
    with pytest.raises(ValueError, match=f"tokens must be {message}"):
        small.logits(tokens)


def test_positions_matter(small):
    """Two orders of the same tokens: without RoPE the last logits would be equal."""
    logits = np.asarray(small.logits(np.array([[1, 2, 3, 4, 5], [4, 2, 3, 1, 5]])))
    assert np.abs(logits[0, -1] - logits[1, -1]).max() > 1e-3


def test_only_distances_matter(small):
    """RoPE is relative: every position moved by 1000, the logits stay."""

    def logits(first):
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 20)))
        decoder = model.bind(small.config, small.params)
        return decoder.logits(decoder(tokens, first + jnp.arange(20)[None], model.plain_attend)[0])

    np.testing.assert_allclose(logits(0), logits(1000), atol=2e-3)
    assert np.abs(logits(0)).max() > 0.1


@pytest.mark.parametrize("qk_norm", [False, True])
def test_matrices_apart_say_the_same(qk_norm):
    """Layer by layer the stack's own, in its memory."""
    own = small_model(small_config(qkv_bias=True, qk_norm=qk_norm))
    stacked, apart = own.params["layers"], own.apart["layers"]
    assert {name for name in apart if isinstance(apart[name], tuple)} == {"q", "k", "v", "o", "gate", "up", "down"}
    for name, stack in stacked.items():
        if stack.ndim == 3:
            assert [matrix.unsafe_buffer_pointer() - stack.unsafe_buffer_pointer() for matrix in apart[name]] == [i * stack[0].nbytes for i in range(3)]
        else:
            assert apart[name] is stack
    tokens = np.arange(2 * 9).reshape(2, 9)
    np.testing.assert_allclose(model.full_logits(own.config, own.apart, tokens), model.full_logits(own.config, own.params, tokens), atol=1e-5)


def test_matrices_apart_are_bound_to_a_device_where_the_stack_is(small):
    bound = dataclasses.replace(small, params=jax.device_put(small.params, jax.devices()[0]))
    for own, committed in ((small, False), (bound, True)):
        assert {matrix.committed for name in ("q", "down") for matrix in own.apart["layers"][name]} == {committed}


def test_matrices_of_numpy_are_set_apart_too(small):
    """As a loader of one's own may give them."""
    theirs = dataclasses.replace(small, params=jax.tree.map(np.asarray, small.params))
    found = theirs.apart["layers"]["q"]
    assert {matrix.committed for matrix in found} == {False}
    np.testing.assert_array_equal(np.stack(found), small.params["layers"]["q"])


@pytest.mark.parametrize("platforms", [("gpu",), ("cpu", "cpu")])
def test_matrices_stay_stacked_where_no_cpu_has_them_all(small, platforms):
    Device = collections.namedtuple("Device", "id platform")
    leaf = types.SimpleNamespace(devices=lambda: {Device(i, platform) for i, platform in enumerate(platforms)}, ndim=3)
    elsewhere = dataclasses.replace(small, params={"layers": {"q": leaf}})
    assert elsewhere.apart is elsewhere.params


def test_tied_and_untied_heads():
    tokens = np.arange(20)[None]
    tied = small_model(small_config(tie_embeddings=True))
    assert "head" not in tied.params
    head = tied.params["embed"].T
    untied = model.Model(small_config(), tied.params | {"head": head})
    np.testing.assert_allclose(tied.logits(tokens), untied.logits(tokens), atol=1e-5)
    other = model.Model(small_config(), tied.params | {"head": 2 * head})
    np.testing.assert_allclose(2 * np.asarray(tied.logits(tokens)), other.logits(tokens), atol=1e-5)


@pytest.mark.parametrize("option, names", [("qkv_bias", ("q_bias", "k_bias", "v_bias")), ("qk_norm", ("q_norm", "k_norm"))])
def test_every_optional_parameter_is_used(small, option, names):
    tokens = np.arange(10)[None]
    base = small_model(small_config(**{option: True}))
    assert set(base.params["layers"]) - set(small.params["layers"]) == set(names)
    for name in names:
        leaf = base.params["layers"][name]
        # Not the same everywhere: a key bias that is would change no attention.
        changed = leaf.at[1].add(jax.random.normal(jax.random.key(0), leaf.shape[1:]))
        other = dataclasses.replace(base, params=base.params | {"layers": base.params["layers"] | {name: changed}})
        assert np.abs(other.logits(tokens) - base.logits(tokens)).max() > 1e-4, name


def test_bfloat16_computes_in_bfloat16_and_returns_float32_logits(small):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small.params)
    logits = dataclasses.replace(small, params=params).logits(np.arange(20)[None])
    assert logits.dtype == jnp.float32
    difference = np.abs(logits - small.logits(np.arange(20)[None])).max()
    assert 0 < difference < 0.15 * np.abs(logits).max()


# Against transformers. The measured differences are printed: `pytest -m compare -s tests/test_model.py`.

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LINEAR = dict(rope_type="linear", factor=2.0)

# family, rope scaling, other options, tied, shard size
FAMILIES = {
    "llama": ("Llama", None, {}, False, None),
    "llama-tied": ("Llama", None, {}, True, None),
    "llama-linear": ("Llama", LINEAR, {}, False, None),
    "llama-llama3": ("Llama", LLAMA3, {}, False, None),
    "llama-sharded": ("Llama", LLAMA3, {}, False, "100KB"),
    "qwen2": ("Qwen2", None, {}, False, None),
    "qwen2-tied-sharded": ("Qwen2", None, {}, True, "100KB"),
    "qwen2-yarn": ("Qwen2", YARN, {}, False, None),
    "qwen3": ("Qwen3", None, {"head_dim": 32}, False, None),
    "qwen3-tied-sharded": ("Qwen3", None, {"head_dim": 32}, True, "100KB"),
    "qwen3-yarn": ("Qwen3", YARN | {"beta_fast": 8.0, "attention_factor": 1.3}, {"head_dim": 32}, False, None),
}


@pytest.mark.compare
@pytest.mark.parametrize("family, scaling, options, tied, shards", FAMILIES.values(), ids=FAMILIES.keys())
def test_random_models_equal_transformers(tmp_path, family, scaling, options, tied, shards):
    """Saved by transformers, read by us: the logits of 300 tokens, which the stretched models' first 64 positions do not cover."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rope = {"rope_theta": 5000.0} | (scaling or {"rope_type": "default"})
    config = getattr(transformers, f"{family}Config")(
        vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6 if options else 4, num_key_value_heads=2,
        max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=tied, rope_parameters=rope, **options,
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            # Biases, norms and heads that start at zero, one or near it would hide mistakes.
            parameter.add_(0.15 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if shards else (tmp_path / "model.safetensors").is_file()
    tokens = np.random.default_rng(0).integers(0, 199, (2, 300))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    found = np.asarray(model.Model(*huggingface.load(tmp_path)).logits(tokens))
    difference = np.abs(found - expected).max()
    print(f"\n{family}, {scaling and scaling['rope_type']}: max |difference| {difference:.2e}, logits up to {np.abs(expected).max():.1f}")
    assert difference <= 1e-4
    if scaling:
        # The test must be able to fail: without the scaling the logits are others.
        bare, params = huggingface.load(tmp_path)
        assert np.abs(model.Model(dataclasses.replace(bare, rope_scaling=None), params).logits(tokens) - expected).max() > 1e-2


def texts():
    """Prose, code, markup and Unicode from the standard library, long ones."""
    topics = pydoc_data.topics.topics
    prose = "\n\n".join(topics[name] for name in sorted(topics))
    return [prose[100_000:], prose[200_000:], topics["formatstrings"] + prose, prose[50_000:]]


STRINGS = [
    "The capital of France is",
    "  leading and trailing spaces  ",
    "tabs\tand\nnewlines\r\n\n\n   indented",
    "0123456789 1,234.56 2024-11-24 v1.2.3",
    "don't they're WE'LL I'd",
    "Grüße, façade, naïve, \u00e9 e\u0301",
    "日本語のテキスト 中文 한국어 العربية עברית ไทย",
    "emoji 😀👩‍👩‍👧‍👦🇫🇷 ½ ² ﬁ \u200b\u00a0\ufeff",
    "<|im_start|>user\nHello<|im_end|>\n<|endoftext|>",
    "<|im_start> <|not a token|>",
    "def f(x):\n    return x ** 2  # square\n",
    "https://example.org/a?b=c&d=%20#e",
    "a" * 300,
    " ",
]


@pytest.mark.compare
@pytest.mark.slow
def test_smollm2_equals_transformers():
    """SmolLM2 from the same GGUF file, float32 here and there, on four texts; and the two tokenizers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path = download.smollm2_135m()
    config, params, metadata = gguf.load(path, "float32")
    ours = model.Model(config, params, None, Tokenizer.from_gguf(metadata))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    long = texts()
    texts_and_strings = [*STRINGS, *(text[:20_000] for text in long)]
    for text in texts_and_strings:
        if not any(character.isnumeric() for character in text):
            assert ours.tokenizer.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text[:60]
    # transformers makes a Llama tokenizer of every file of Llama architecture: it adds a BOS, which this file does not ask for, and ignores that the
    # file's pre-tokenizer is "smollm", which cuts numerals apart before the words, in llama.cpp too. With it, the two agree on numbers as well.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
    for text in texts_and_strings:
        assert ours.tokenizer.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text[:60]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    differences = []
    for text, length in zip(long, (64, 300, 1000, 2048), strict=True):
        tokens = np.array([ours.tokenizer.encode(text[: 10 * length])[:length]])
        assert tokens.shape == (1, length)
        with torch.no_grad():
            expected = theirs(torch.from_numpy(tokens)).logits[0].numpy()
        found = np.asarray(ours.logits(tokens))[0]
        ranked = np.sort(expected, axis=-1)
        differences.append(np.abs(found - expected).max())
        print(f"\n{length} tokens: max |difference| {differences[-1]:.2e}, logits from {expected.min():.1f} to {expected.max():.1f},", end=" ")
        print(f"closest argmax by {(ranked[:, -1] - ranked[:, -2]).min():.1e}, argmax differs at {(found.argmax(-1) != expected.argmax(-1)).sum()}")
        np.testing.assert_array_equal(found.argmax(axis=-1), expected.argmax(axis=-1))
    assert max(differences) <= 1e-3


@pytest.mark.parametrize("changes, message", [(dict(kv_heads=0), "got 4 and 0"), (dict(kv_heads=3), "multiple of its kv heads"), (dict(head_dim=7), "even")])
def test_heads_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)
