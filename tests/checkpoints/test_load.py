"""The one door: what is refused before the weights are read, and a tokenizer that belongs to another model."""

import json
import shutil

import jax
import pytest
import safetensors.numpy

import retention
from retention import checkpoints
from retention.checkpoints import gguf, huggingface
from tests.tiny import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    "gates, error, message",
    [
        ("shipped", ValueError, "gates='shipped' exist for: "),
        ("absent.safetensors", FileNotFoundError, "there is no gates file absent.safetensors"),
        (True, ValueError, "gates must be 'auto', 'shipped', the path of a gates file, or None, got True"),
        (3, ValueError, "gates must be .* or None, got 3"),
    ],
)
def test_gates_are_refused_before_the_weights_are_read(folder, monkeypatch, gates, error, message):
    def never(*_):
        raise AssertionError("the weights are read")

    monkeypatch.setattr(huggingface, "load", never)
    with pytest.raises(error, match=message):
        retention.load(folder, gates=gates)


def rows(folder, tmp_path, count):
    """The model with an embedding of the first `count` of its 600 rows."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = safetensors.numpy.load_file(copy / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:count].copy()
    safetensors.numpy.save_file(tensors, copy / "model.safetensors")
    entries = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(entries | {"vocab_size": count}))
    return copy


def test_numbers_of_64_bits_are_refused(folder):
    with jax.enable_x64(True), pytest.raises(ValueError, match="jax_enable_x64 is on.*: turn it off"):
        retention.load(folder)
    assert retention.load(folder).config.layers


def test_a_tokenizer_with_ids_that_the_embedding_has_not(folder, tmp_path):
    assert retention.load(folder).tokenizer.largest_id == 599
    with pytest.raises(ValueError, match="has token ids up to 599, but the model's embedding only 599 rows: put the tokenizer that belongs to the model"):
        retention.load(rows(folder, tmp_path, 599))


def test_an_added_token_that_the_embedding_has_not(folder, tmp_path):
    """As in Llama 2's first files: the model is used without it, and a text that spells it is refused."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((copy / "tokenizer.json").read_text())
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    content["added_tokens"].append({"id": 600, "content": "<pad>", **flags})
    (copy / "tokenizer.json").write_text(json.dumps(content))
    session = retention.Session(retention.load(copy), budget=None)
    session.append("A text")
    with pytest.raises(ValueError, match="the text holds a token of id 600, but the model's embedding has 600 rows; take it out"):
        session.append("and <pad>")
    assert session.generate(" goes on", max_new_tokens=3).tokens


def test_a_tokenizer_with_a_gap_in_its_ids(folder, tmp_path):
    """It is the largest id that counts, not how many there are; a table may have more rows than that."""
    copy = rows(folder, tmp_path, 590)
    content = json.loads((copy / "tokenizer.json").read_text())
    kept = {token: one for token, one in content["model"]["vocab"].items() if one < 500 or one == 589}
    content["model"] |= {"vocab": kept, "merges": []}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = retention.load(copy).tokenizer
    assert (tokenizer.vocab_size, tokenizer.largest_id) == (501, 589)
    del kept[next(token for token, one in kept.items() if one == 589)]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert retention.load(copy).tokenizer.largest_id == 499
    kept["beyond"] = 590
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="token ids up to 590"):
        retention.load(copy)


@pytest.mark.parametrize("reader", [huggingface, gguf])
def test_dtype_and_place_reach_either_reader(folder, monkeypatch, reader):
    class Read(Exception):
        pass

    def read(path, dtype, place):
        raise Read(dtype, place)

    def place(config, name):
        return None

    monkeypatch.setattr(reader, "load", read)
    with pytest.raises(Read) as found:
        checkpoints.load(folder if reader is huggingface else folder / "config.json", dtype="bfloat16", place=place)
    assert found.value.args == ("bfloat16", place)
