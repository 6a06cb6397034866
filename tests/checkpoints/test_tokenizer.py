"""Tokenizers: small ones trained here, and the real one of SmolLM2-135M."""

import copy
import datetime
import json
import re

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, trainers

from retention.checkpoints import download
from retention.checkpoints.tokenizer import PRE_TOKENIZERS, Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message['role'] == 'tool' %}\n{{ raise_exception('no tools here') }}{% endif %}\n"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["The capital of France is Paris.", "", "  two  spaces\n\n\nand 12345 digits, don't", "naïve 日本語 🙂👩‍👩‍👧 \x00\t\r\n", "<think>"]


def metadata(pre="smollm", **changes):
    """GGUF metadata of a byte-level BPE trained on TEXTS, with one user-defined token."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = PRE_TOKENIZERS["gpt-2"]()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<think>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 4 if token == "<think>" else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


SMALL = Tokenizer.from_gguf(metadata())


@pytest.mark.parametrize("kind", [4, 1])
def test_what_ends_a_turn_is_special_wherever_a_file_has_it(kind):
    facts = metadata()
    end = facts["tokenizer.ggml.tokens"].index("<|im_end|>")
    assert facts["tokenizer.ggml.eos_token_id"] == end
    facts["tokenizer.ggml.token_type"][end] = kind
    tokenizer = Tokenizer.from_gguf(facts)
    assert tokenizer.eos_ids[0] == end and tokenizer.decode(SMALL.encode("hi<|im_end|>")) == "hi"
    assert tokenizer.plain("a<|im_end|>b") == "ab" and end not in tokenizer.encode("a<|im_end|>b", special=False)
    assert tokenizer.plain("a<|im_<|im_<|im_end|>end|>end|>b") == "ab", "nor what is a name once another is gone"
    assert tokenizer.encode("a<|im_end|>b <think>") == SMALL.encode("a<|im_end|>b <think>"), "as it was, and with what is no end"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_round_trip(pre, text):
    tokenizer = Tokenizer.from_gguf(metadata(pre))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["It", "'s", " 12345", " a", ",", "\n\n ", " B"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", " a", ",", "\n\n ", " B"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", " a", ",\n\n", " ", " B"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", " a", ",\n\n", " ", " B"]),
    ],
)
def test_words(pre, words):
    text = "It's 12345 a,\n\n  B"
    pieces = [text[start:end] for _, (start, end) in PRE_TOKENIZERS[pre]().pre_tokenize_str(text)]
    assert pieces == words


def test_merges_stay_within_words():
    everything = {"tokens": [*SPECIAL, "1", "2", "12"], "token_type": [3, 3, 3, 1, 1, 1], "merges": ["1 2"]}
    assert Tokenizer.from_gguf(metadata("gpt-2", **everything)).encode("12") == [5]
    assert Tokenizer.from_gguf(metadata("smollm", **everything)).encode("12") == [3, 4]


def test_llama3_takes_whole_words_and_qwen2_normalises():
    # "abc" is a token that no merge leads to.
    vocabulary = {"tokens": [*SPECIAL, "a", "b", "c", "abc"], "token_type": [3, 3, 3, 1, 1, 1, 1], "merges": []}
    assert Tokenizer.from_gguf(metadata("llama-bpe", **vocabulary)).encode("abc", bos=False) == [6]
    assert Tokenizer.from_gguf(metadata("qwen2", **vocabulary)).encode("abc") == [3, 4, 5]
    decomposed = "e\N{COMBINING ACUTE ACCENT}"
    qwen = Tokenizer.from_gguf(metadata("qwen2"))
    assert qwen.decode(qwen.encode(decomposed)) == "\N{LATIN SMALL LETTER E WITH ACUTE}"
    assert SMALL.decode(SMALL.encode(decomposed)) == decomposed


def test_special_tokens():
    text = "<|im_start|>user\n<think>hi<|im_end|>"
    ids = SMALL.encode(text)
    assert (ids[0], ids[-1]) == (1, 2)
    assert SMALL.vocab_size - 1 in ids  # <think>
    assert SMALL.decode(ids) == "user\n<think>hi"
    plain = SMALL.encode(text, special=False)
    assert not {0, 1, 2} & set(plain)
    assert SMALL.decode(plain) == text
    assert SMALL.encode(text) == ids  # the choice is not remembered


def test_eos_ids():
    assert SMALL.eos_ids == (2, 0)
    assert Tokenizer.from_gguf(metadata(eos_token_id=0)).eos_ids == (0,)
    assert Tokenizer.from_gguf(metadata(eos_token_id=0, eot_token_id=2)).eos_ids == (0, 2)
    other = copy.copy(SMALL)
    other.eos_ids = (0,)
    assert other.digest() != SMALL.digest(), "a run does not go on with another end"


def test_bos():
    assert SMALL.encode("hi")[0] != 1
    tokenizer = Tokenizer.from_gguf(metadata(add_bos_token=True))
    with_bos = tokenizer.encode("hi")
    assert with_bos == [1, *SMALL.encode("hi")]
    assert tokenizer.encode("hi", bos=False) == SMALL.encode("hi")
    assert tokenizer.encode("<|im_start|>hi") == with_bos  # one is enough
    llama = metadata("llama-bpe")
    del llama["tokenizer.ggml.add_bos_token"]
    assert Tokenizer.from_gguf(llama).encode("hi")[0] == 1


@settings(deadline=None)
@given(st.lists(st.integers(0, SMALL.vocab_size - 1), max_size=40))
def test_streamed_pieces_sum_to_the_whole(ids):
    decoder = SMALL.stream_decoder()
    pieces = [decoder.push(token_id) for token_id in ids]
    assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces)
    assert "".join(pieces) + decoder.finish() == SMALL.decode(ids)


def test_streaming_holds_back_split_characters():
    ids = Tokenizer.from_gguf(metadata(merges=[])).encode("a🙂é")
    assert len(ids) == 1 + 4 + 2
    decoder = SMALL.stream_decoder()
    assert [decoder.push(token_id) for token_id in ids] == ["a", "", "", "", "🙂", "", "é"]
    assert decoder.finish() == ""
    assert [decoder.push(token_id) for token_id in ids[:3]] == ["a", "", ""]
    assert decoder.finish() == "\N{REPLACEMENT CHARACTER}"
    assert [decoder.push(token_id) for token_id in ids[5:]] == ["", "é"]


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>"}]


def test_chat():
    expected = "<|im_start|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n"
    assert SMALL.chat(MESSAGES, add_generation_prompt=False) == expected
    assert SMALL.chat(MESSAGES) == expected + "<|im_start|>assistant\n"


def test_a_turn_is_what_chat_puts_around_a_message():
    opening, closing = SMALL.turn()
    assert opening + "Hi" + closing == SMALL.chat([{"role": "user", "content": "Hi"}])
    assert opening and closing.endswith("assistant\n")


def with_template(template):
    return Tokenizer.from_gguf(metadata() | {"tokenizer.chat_template": template})


def test_the_day_that_templates_are_told():
    tokenizer = with_template("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    before = tokenizer.at(datetime.datetime(2024, 7, 26))
    assert before.chat(MESSAGES) == "26 Jul 2024 Be brief." != tokenizer.chat(MESSAGES)


def test_chat_template_functions_and_sandbox():
    assert re.fullmatch(r"\d{4}", with_template("{{ strftime_now('%Y') }}").chat(MESSAGES))
    assert with_template("{{ bos_token }}{{ eos_token }}").chat(MESSAGES) == "<|im_start|><|im_end|>"
    assert with_template("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}").chat(MESSAGES) == "system"
    assert with_template("{% if tools is not none or documents is not none %}Tools!{% endif %}").chat(MESSAGES) == ""
    marked = with_template("{% set n = 1 %}{% generation %}{{ messages[0].content }}{% set n = 2 %}{% endgeneration %}{{ n }}")
    assert marked.chat(MESSAGES) == "Be brief.2"
    quoted = [{"role": "user", "content": "Hé <b> it's\n"}]
    assert with_template("{{ messages[0].content | tojson }}").chat(quoted) == '"Hé <b> it\'s\\n"'
    assert with_template("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}").chat(MESSAGES) == '{\n "a": [\n  2\n ],\n "b": 1\n}'
    bad = ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{% if %}", "{{ messages[0].content + nothing.at.all }}", "{{ messages[0].content + 3 }}")
    for template in bad:
        with pytest.raises(ValueError, match="chat template"):
            with_template(template).chat(MESSAGES)


def test_chat_refused():
    with pytest.raises(ValueError, match="chat template does not take these messages: no tools here"):
        SMALL.chat([{"role": "tool", "content": "3"}])
    for message in ({"role": "user"}, "Hi"):
        with pytest.raises(ValueError, match='dicts with "role" and "content"'):
            SMALL.chat([message])
    without = metadata()
    del without["tokenizer.chat_template"]
    with pytest.raises(ValueError, match="chat needs a chat template"):
        Tokenizer.from_gguf(without).chat(MESSAGES)


def test_a_template_that_says_something_else_is_refused():
    for template in ("{{ messages[0].content | upper }}", "{{ messages[0].role }}"):
        with pytest.raises(ValueError, match="does not write a message as it is: of 'zq1question' it makes"):
            with_template(template).turn()
    first = with_template("{% for m in messages %}{{ m.content if loop.last else m.content | upper }}{% endfor %}")
    with pytest.raises(ValueError, match="does not write a message as it is: of 'zq2answer' it makes 'ZQ1QUESTIONZQ2ANSWER'"):
        first.between()


def test_gguf_refused():
    with pytest.raises(NotImplementedError, match="'llama' is not supported; gpt2"):
        Tokenizer.from_gguf(metadata(model="llama"))
    with pytest.raises(NotImplementedError, match="'tekken' is not supported; gpt-2, smollm, llama-bpe, qwen2 are"):
        Tokenizer.from_gguf(metadata("tekken"))
    for key in ("model", "pre", "tokens", "token_type", "merges"):
        partial = metadata()
        del partial[f"tokenizer.ggml.{key}"]
        with pytest.raises(ValueError, match=f"no tokenizer.ggml.{key}"):
            Tokenizer.from_gguf(partial)
    for key in ("bos_token_id", "eos_token_id", "eot_token_id"):
        for token_id in (-1, 10**6):
            with pytest.raises(ValueError, match=f"has tokenizer.ggml.{key} = {token_id}, which is none of its"):
                Tokenizer.from_gguf(metadata(**{key: token_id}))
    with pytest.raises(ValueError, match=f"has {SMALL.vocab_size} tokenizer.ggml.tokens and 2 of tokenizer.ggml.token_type"):
        Tokenizer.from_gguf(metadata(token_type=[1, 1]))
    for merges in (["ab"], ["日 本"], [3]):
        with pytest.raises(ValueError, match="tokenizer.ggml.merges are not those of its tokens"):
            Tokenizer.from_gguf(metadata(merges=merges))


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder of the same tokenizer as SMALL, one that pads and cuts when left to itself."""
    own = tokenizers.Tokenizer.from_str(SMALL._tokenizer.to_str())
    own.enable_padding(length=64)
    own.enable_truncation(max_length=3)
    own.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_folder(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size == SMALL.vocab_size
    assert tokenizer.eos_ids == (2, 0)
    assert tokenizer.chat(MESSAGES) == SMALL.chat(MESSAGES)
    for text in [*TEXTS, SMALL.chat(MESSAGES)]:
        assert tokenizer.encode(text) == SMALL.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == SMALL.decode(SMALL.encode(text))


@pytest.mark.parametrize("listed", [False, True])
def test_folder_whose_special_tokens_are_named_beside_it(folder, listed):
    """In the vocabulary of tokenizer.json, and only tokenizer_config.json says that they are taken whole."""
    bare = json.loads((folder / "tokenizer.json").read_text())
    bare["added_tokens"] = [token for token in bare["added_tokens"] if token["content"] not in ("<|im_start|>", "<|im_end|>")]
    (folder / "tokenizer.json").write_text(json.dumps(bare))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if listed:
        entry = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
        config["added_tokens_decoder"] = {"1": {"content": "<|im_start|>", **entry}, "2": {"content": "<|im_end|>", **entry}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("hi<|im_end|>") == SMALL.encode("hi<|im_end|>") and tokenizer.decode(SMALL.encode("hi<|im_end|>")) == "hi"
    assert (tokenizer.encode("<|im_start|>hi") == SMALL.encode("<|im_start|>hi")) == listed == (tokenizer.plain("<|im_start|>a") == "a")
    assert tokenizer.vocab_size == SMALL.vocab_size and tokenizer.plain("a<|im_end|>") == "a"


def test_folder_without_tokenizer_config(folder):
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == (0,)
    with pytest.raises(ValueError, match="chat needs a chat template"):
        tokenizer.chat(MESSAGES)


def test_folder_eos_and_templates(folder):
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    config = {"eos_token": None, "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == (5, 2, 7, 0)
    assert tokenizer.chat(MESSAGES) == "d"
    (folder / "chat_template.jinja").write_text("from a file")
    assert Tokenizer.from_folder(folder).chat(MESSAGES) == "from a file"


def test_folder_and_gguf_begin_texts_alike(folder):
    """DeepSeek-R1's distilled models have the token that begins a text in the flag alone."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write = (folder / "tokenizer_config.json").write_text
    write(json.dumps(config | {"add_bos_token": True}))
    flagged, wanted = Tokenizer.from_folder(folder), Tokenizer.from_gguf(metadata(add_bos_token=True))
    for text in [*TEXTS, flagged.chat(MESSAGES)]:
        assert flagged.encode(text) == wanted.encode(text) and flagged.encode(text, bos=False) == SMALL.encode(text)
    assert flagged.encode("") == [1]
    # What tokenizer.json adds itself stays, whatever the flag.
    wanted._tokenizer.save(str(folder / "tokenizer.json"))
    for flag in (True, False):
        write(json.dumps(config | {"add_bos_token": flag}))
        assert Tokenizer.from_folder(folder).encode("hi") == wanted.encode("hi")


def test_folder_whose_beginning_cannot_be_added(folder):
    write = (folder / "tokenizer_config.json").write_text
    for token in (None, "<s>"):
        write(json.dumps({"add_bos_token": True, "bos_token": token}))
        with pytest.raises(ValueError, match="has add_bos_token, but its bos_token '(<s>)?' is no token of tokenizer.json"):
            Tokenizer.from_folder(folder)
    other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    other.post_processor = tokenizers.processors.TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)])
    other.save(str(folder / "tokenizer.json"))
    write(json.dumps({"add_bos_token": True, "bos_token": "<|im_start|>"}))
    with pytest.raises(NotImplementedError, match="add_bos_token where tokenizer.json adds other tokens"):
        Tokenizer.from_folder(folder)


def test_folder_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json in .*absent"):
        Tokenizer.from_folder(tmp_path / "absent")
    for config, error, message in (
        ({"eos_token": ["<|im_end|>"]}, ValueError, "has eos_token = .*, which must be a token's name"),
        ({"eos_token": "</s>"}, NotImplementedError, "has a token '</s>' that tokenizer.json lacks"),
        ({"added_tokens_decoder": {"9": {"content": "<|tool|>", "special": True}}}, NotImplementedError, "has a token '<|tool|>' that tokenizer.json lacks"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(error, match=re.escape(message) if "|" in message else message):
            Tokenizer.from_folder(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is not valid JSON"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def smollm2():
    reader = gguf.GGUFReader(download.smollm2_135m())
    return Tokenizer.from_gguf({key: field.contents() for key, field in reader.fields.items()})


def test_smollm2(smollm2):
    assert smollm2.vocab_size == 49152
    assert smollm2.eos_ids == (2, 0)
    assert smollm2.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    words = [smollm2.decode([token_id]) for token_id in smollm2.encode("Room 407, naïvely")]
    assert words == ["Room", " ", "4", "0", "7", ",", " na", "ï", "vely"]
    chat = smollm2.chat([{"role": "user", "content": "Hi"}])
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = smollm2.encode(chat)
    assert (ids.count(1), ids.count(2)) == (3, 2)
    for text in TEXTS:
        assert smollm2.decode(smollm2.encode(text)) == text
