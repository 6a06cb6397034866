"""Record files: the layouts, the three formats, chat templates, and every way in which data can be bad."""

import copy
import json
import pathlib
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from tokenizers import processors

from retention.checkpoints.tokenizer import Tokenizer
from retention.training import files
from retention.training.records import Records, chat_pieces, read_columns
from tests.tiny import TEMPLATE, write_folder

ASKED = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_folder(write_folder(tmp_path_factory.mktemp("model")))


def templated(tokenizer, template):
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def write(path, records):
    """Records as their file's extension says; a bytes record of JSON lines stands as it is."""
    if path.suffix == ".jsonl":
        path.write_bytes(b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in records))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)
    else:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for one in records:
            writer.write(one if isinstance(one, bytes) else json.dumps(one).encode())
        writer.close()
    return str(path)


def opened(tokenizer, path, max_chars=1000):
    return Records(str(path), tokenizer, max_chars)


def read(source, tokenizer):
    """Each document as text, special tokens left out, with its assistant's tokens' text."""
    found = []
    for index in range(len(source)):
        tokens, answer = source.document(index, tokenizer)
        assert tokens.dtype == "int32" and answer.dtype == bool and tokens.shape == answer.shape
        found.append((tokenizer.decode(tokens), tokenizer.decode(tokens[answer])))
    return found


LAYOUTS = [
    ({"messages": [{"role": "system", "content": "S"}, *ASKED]}, ("system\nS\nuser\nWhy?\nassistant\nBecause.\n", "Because.")),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, ("user\nQ\nassistant\nA\n", "A")),
    ({"instruction": "I", "input": "", "output": "O"}, ("user\nI\nassistant\nO\n", "O")),
    ({"instruction": "I", "input": "N", "output": "O"}, ("user\nI\n\nN\nassistant\nO\n", "O")),
    ({"problem": "P", "generations": ["G", "H"], "solution": "S"}, ("user\nP\nassistant\nG\n", "G")),
    ({"problem": "P", "solution": "S"}, ("user\nP\nassistant\nS\n", "S")),
    ({"text": "Plain <|im_end|>."}, ("Plain <|im_end|>.", "")),  # a control token's name in a plain text is text
]


@pytest.mark.parametrize("extension", ["jsonl", "parquet", "array_record"])
@pytest.mark.parametrize(("record", "expected"), LAYOUTS)
def test_layouts(tokenizer, tmp_path, record, expected, extension):
    source = opened(tokenizer, write(tmp_path / f"a.{extension}", [record | {"other": 1}]))
    assert read(source, tokenizer) == [expected]
    assert source.answers == ("text" not in record)
    assert source.report == {"documents": 1, "skipped": {}, "first": {}}


def test_formats_read_the_same(tokenizer, tmp_path):
    records = [{"messages": [{"role": "user", "content": f"Number {number}?"}, {"role": "assistant", "content": "é" * number}]} for number in range(7)]
    sources = [opened(tokenizer, write(tmp_path / f"a.{extension}", records)) for extension in ("jsonl", "parquet", "array_record")]
    lines = read(sources[0], tokenizer)
    assert [answer for _, answer in lines] == ["é" * number for number in range(1, 7)]
    for source in sources:
        assert source.report["skipped"] == {"no assistant's turn": 1}
        assert [place.rsplit(":")[-1] for place in source.report["first"].values()] == ["1"]
        assert read(pickle.loads(pickle.dumps(source)), tokenizer) == lines


def test_only_the_columns_of_its_layout_are_read(tokenizer, tmp_path):
    record = {"messages": ASKED, "problem": "P", "generations": ["long"], "solution": "S", "text": "T"}
    path = write(tmp_path / "a.parquet", [record])
    file = files.open_file(str(path), 100, read_columns)
    assert [set(file.decode(raw)) for _, raw in file.scan()] == [{"messages"}]


def test_layout_of_the_first_record_that_has_one(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"version": 1}, {}, {"messages": None, "conversations": LAYOUTS[1][0]["conversations"]}, {"messages": ASKED}])
    source = opened(tokenizer, path)
    assert read(source, tokenizer) == [LAYOUTS[1][1]]
    reasons = {"columns of no known layout": 2, "`conversations` is missing or no list": 1}
    assert source.report["skipped"] == reasons and source.report["first"] == dict(zip(reasons, (f"{path}:1", f"{path}:4"), strict=True))


@pytest.mark.parametrize("extension", ["jsonl", "parquet", "array_record"])
def test_the_digest_is_of_what_records_say(tokenizer, tmp_path, extension):
    digests = [opened(tokenizer, write(tmp_path / f"a.{extension}", [{"text": text}])).digest for text in ("one", "two", "one")]
    assert digests[0] == digests[2] != digests[1]


def test_several_files(tokenizer, tmp_path):
    write(tmp_path / "a1.jsonl", [{"text": "one"}])
    write(tmp_path / "a2.jsonl", [{"text": "two"}, {"text": ""}])
    write(tmp_path / "b.jsonl", [b"{", {"messages": ASKED}, b"]"])
    source = opened(tokenizer, f"{tmp_path}/a*.jsonl, {tmp_path}/b.jsonl, {tmp_path}/a1.jsonl")  # each file once
    assert [text for text, _ in read(source, tokenizer)] == ["one", "two", "user\nWhy?\nassistant\nBecause.\n"]
    assert source.answers
    assert source.report == {
        "documents": 3,
        "skipped": {"no text": 1, "malformed JSON": 2},
        "first": {"no text": f"{tmp_path}/a2.jsonl:2", "malformed JSON": f"{tmp_path}/b.jsonl:1"},
    }


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"messages": "\xff\xfe"}', "invalid UTF-8"),
        (rb'{"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a"}]}', "invalid UTF-8"),
        (rb'{"messages": [{"role": "\ud800", "content": "hi"}, {"role": "assistant", "content": "a"}]}', "invalid UTF-8"),
        (b'{"messages": [', "malformed JSON"),
        (b"[" * 100_000, "longer than max_chars"),
        (b"[" * 15_000, "malformed JSON"),  # deeper than Python's parser goes
        (b'["messages"]', "no JSON object"),
        ({"text": "no such column here"}, "`messages` is missing or no list"),
        ({"messages": "Why? Because."}, "`messages` is missing or no list"),
        ({"messages": ["Why?"]}, "`messages` is not a list of {role, content}"),
        ({"messages": [{"role": "user", "content": None}, ASKED[1]]}, "turns that are not text"),
        ({"messages": []}, "no assistant's turn"),
        ({"messages": ASKED[:1]}, "no assistant's turn"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": " \n"}]}, "no assistant's turn"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": "a" * 1000}]}, "longer than max_chars"),
    ],
)
def test_bad_records_are_skipped_and_counted(tokenizer, tmp_path, bad, reason):
    good = {"messages": ASKED}
    path = write(tmp_path / "a.jsonl", [good, b"", bad, good, bad])
    source = opened(tokenizer, path)
    assert source.report == {"documents": 2, "skipped": {reason: 2}, "first": {reason: f"{path}:3"}}
    assert [answer for _, answer in read(source, tokenizer)] == ["Because.", "Because."]


def test_a_line_of_ten_million_characters(tokenizer, tmp_path):
    huge = {"text": "a" * 10_000_000}
    path = write(tmp_path / "a.jsonl", [huge, {"text": "small"}])
    for max_chars in (1000, 1_000_000, 9_999_999):  # by the line's bytes, and by the text's characters
        source = opened(tokenizer, path, max_chars)
        assert source.report == {"documents": 1, "skipped": {"longer than max_chars": 1}, "first": {"longer than max_chars": f"{path}:1"}}
        assert read(source, tokenizer) == [("small", "")]
    assert opened(tokenizer, path, 10_000_000).report["documents"] == 2


def test_last_line_without_an_end_and_windows_files(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    source = opened(tokenizer, path)
    assert read(source, tokenizer) == [("one", ""), ("two", "")] and not source.report["skipped"]


def test_parquet_with_invalid_utf8(tokenizer, tmp_path):
    offsets, characters = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 3, 5, 8))), pyarrow.py_buffer(b"one\xff\xfetwo")
    column = pyarrow.StringArray.from_buffers(3, offsets, characters)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    source = opened(tokenizer, tmp_path / "a.parquet")
    assert source.report == {"documents": 2, "skipped": {"invalid UTF-8": 1}, "first": {"invalid UTF-8": f"{tmp_path}/a.parquet:2"}}
    assert read(source, tokenizer) == [("one", ""), ("two", "")]


@pytest.mark.parametrize("extension", ["jsonl", "parquet", "array_record"])
def test_files_that_are_refused(tokenizer, tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    with pytest.raises(FileNotFoundError, match=f"a.{extension}"):
        opened(tokenizer, path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"a.{extension} is empty"):
        opened(tokenizer, path)
    path.write_bytes(b"\0 no such file \xff\n" * 100)
    with pytest.raises(ValueError, match=rf"a.{extension} (holds no usable record \(100 x invalid UTF-8\)|is no .* file that can be read)"):
        opened(tokenizer, path)
    write(path, [{"prompt": "a", "output": "b"}])
    with pytest.raises(ValueError, match=rf"a.{extension} has the columns prompt, output; records need messages, .* or instruction with output"):
        opened(tokenizer, path)
    write(path, [{"text": ""}, {"text": " "}])
    with pytest.raises(ValueError, match=rf"a.{extension} holds no usable record \(2 x no text\)"):
        opened(tokenizer, path)


def test_other_refusals(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text("text\na\n")
    with pytest.raises(ValueError, match="a.csv is none of the record files .*: .jsonl, .parquet, .array_record"):
        opened(tokenizer, tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="a.jsonl holds no usable record"):
        opened(tokenizer, tmp_path / "a.jsonl")
    path = write(tmp_path / "b.jsonl", [{"messages": ASKED}])
    with pytest.raises(ValueError, match="b.jsonl .*no usable record .*chat template"):
        opened(templated(tokenizer, None), path)
    whole = pathlib.Path(write(tmp_path / "c.parquet", [{"text": "x" * 1000}]))
    whole.write_bytes(whole.read_bytes()[:4] + bytes(20) + whole.read_bytes()[24:])
    with pytest.raises(ValueError, match="c.parquet is damaged: its row group 0 cannot be read"):
        opened(tokenizer, whole)
    (tmp_path / "d.parquet").mkdir()
    with pytest.raises(ValueError, match="d.parquet is a folder; give the files in it, as '.*d.parquet/[*].parquet'"):
        opened(tokenizer, tmp_path / "d.parquet")
    source = opened(tokenizer, path)
    (tmp_path / "b.jsonl").write_text("changed")
    with pytest.raises(ValueError, match="b.jsonl is not what it was when training began"):
        source.document(0, tokenizer)


@pytest.mark.parametrize("extension", [".parquet", ".array_record"])
def test_damage_anywhere_is_told_by_the_files_name(tokenizer, tmp_path, extension):
    path, rng = pathlib.Path(write(tmp_path / f"a{extension}", [{"text": f"Number {i} of some."} for i in range(50)])), np.random.default_rng(0)
    whole, told = np.frombuffer(path.read_bytes(), np.uint8), 0
    for _ in range(40):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 8)] = rng.integers(0, 256, 8)
        path.write_bytes(damaged.tobytes())
        try:
            source = opened(tokenizer, path)
            source.document(0, tokenizer)
        except ValueError as error:
            told += 1
            assert path.name in str(error)
    assert told > 10, "what damage there is to padding shows nowhere"


def test_a_file_counts_once_by_whatever_name(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.jsonl", [{"text": "One."}, {"text": "Two."}])
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    assert len(opened(tokenizer, f"{path},a.jsonl,*.jsonl")) == 2


def test_what_is_said_cannot_end_a_turn(tokenizer, tmp_path):
    said = [{"role": "user", "content": "What does <|im_end|>\n<|im_start|>assistant\nmean?"}, {"role": "assistant", "content": "An <|im_end|> ends."}]
    source = opened(tokenizer, write(tmp_path / "a.jsonl", [{"messages": said}]))
    tokens, answer = source.document(0, tokenizer)
    [end] = tokenizer.encode("<|im_end|>")
    assert (tokens == end).sum() == 2 and (tokens[answer] == end).sum() == 1 and tokens[answer][-1] == end
    assert tokenizer.decode(tokens[answer]) == "An  ends."


TURNS = [*ASKED, {"role": "user", "content": "Why not?"}, {"role": "assistant", "content": "No."}]


def test_pieces_join_to_the_conversation(tokenizer):
    pieces = list(chat_pieces(TURNS, tokenizer))
    assert "".join(piece for piece, _ in pieces) == tokenizer.chat(TURNS, add_generation_prompt=False)
    assert [piece for piece, answer in pieces if answer] == ["Because.<|im_end|>", "No.<|im_end|>"]
    assert pieces[0][0] == tokenizer.chat(TURNS[:1])


def test_a_template_that_forgets_thoughts(tokenizer):
    """Of an earlier turn that is written otherwise later on, what both versions share is an assistant's."""
    content = "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
    other = templated(tokenizer, TEMPLATE.replace("message['content']", content))
    thinking = [one | {"content": f"<think>hm</think>{one['content']}"} if one["role"] == "assistant" else one for one in TURNS]
    whole = other.chat(thinking, add_generation_prompt=False)
    assert "assistant\nBecause." in whole and "<think>hm</think>No." in whole
    pieces = list(chat_pieces(thinking, other))
    assert "".join(piece for piece, _ in pieces) == whole
    assert [piece for piece, answer in pieces if answer] == ["<think>hm</think>No.<|im_end|>"]


def test_a_template_that_puts_an_empty_thought_before_the_last_answer(tokenizer):
    """As Qwen3's: earlier answers are written without it, and are answers all the same."""
    thought = "('<think>\n\n</think>\n\n' if loop.last and message['role'] == 'assistant' else '')"
    other = templated(tokenizer, TEMPLATE.replace("message['content']", f"{thought} + message['content']"))
    turns = [*ASKED, {"role": "user", "content": "Why not?"}, {"role": "assistant", "content": " <b>No.\n"}, *TURNS[2:]]
    whole = other.chat(turns, add_generation_prompt=False)
    assert "assistant\nBecause." in whole and whole.rstrip().endswith("assistant\n<think>\n\n</think>\n\nNo.<|im_end|>")
    pieces = list(chat_pieces(turns, other))
    assert "".join(piece for piece, _ in pieces) == whole
    assert [piece for piece, answer in pieces if answer] == ["Because.<|im_end|>", " <b>No.\n<|im_end|>", "<think>\n\n</think>\n\nNo.<|im_end|>"]


def test_a_template_whose_prompt_opens_a_thought(tokenizer):
    other = templated(tokenizer, TEMPLATE.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"))
    pieces = list(chat_pieces(TURNS, other))
    assert [piece for piece, answer in pieces if answer] == ["Because.<|im_end|>", "No.<|im_end|>"]


def test_a_template_that_refuses_turns(tokenizer, tmp_path):
    other = templated(tokenizer, "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE)
    path = write(tmp_path / "a.jsonl", [{"messages": ASKED}, {"messages": [{"role": "system", "content": "S"}, *ASKED]}])
    source = opened(other, path)
    (reason,) = source.report["skipped"]
    assert "no system here" in reason and source.report["first"] == {reason: f"{path}:2"} and len(source) == 1


def test_a_beginning_stands_once(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "model"))
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokens, answer = opened(tokenizer, write(tmp_path / "a.jsonl", [{"messages": ASKED * 2}])).document(0, tokenizer)
    assert tokens[0] == 0 and (tokens == 0).sum() == 1 and not answer[0]
