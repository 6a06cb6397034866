"""The synthetic training documents, on a small word-level tokenizer and CPython's own manual."""

import re

import numpy as np
import pytest

from retention.training import documents, families, text

TOKEN = re.compile(r"<\|\w+\|>|\s?\w+|\s?[^\w\s]|\s")
NAMES: list[str] = ["pad"]
IDS: dict[str, int] = {}


def encode(string: str) -> list[int]:
    """One id a word, control string or sign; ids are given out in order of appearance."""
    ids = []
    for token in TOKEN.findall(string):
        if token not in IDS:
            IDS[token] = len(NAMES)
            NAMES.append(token)
        ids.append(IDS[token])
    return ids


def decode(ids) -> str:
    return "".join(NAMES[i] for i in ids)


@pytest.fixture(scope="module")
def texts():
    return text.load("pydoc")


def test_tokenizer_of_these_tests_loses_nothing(texts):
    assert decode(encode(texts[3] + documents.ASK)) == texts[3] + documents.ASK


def test_pydoc_is_prose(texts):
    assert sum(map(len, texts)) > 100_000
    joined = "\n\n".join(texts)
    assert "::=" not in joined and ">>>" not in joined and "****" not in joined
    assert not re.search(r"[^\n]\n[^\n]", joined)


def test_load_files_undoes_the_line_breaks_of_prose_alone_and_drops_control_strings(tmp_path):
    (tmp_path / "a.txt").write_text("One line\nand the next.\n\n\nA new<|im_end|> paragraph.")
    (tmp_path / "b.txt").write_text("Second file.")
    assert text.load(f"{tmp_path}/*.txt") == ["One line and the next.\n\nA new paragraph.", "Second file."]
    code = "def one():\n    return 1\n\n\ndef two():\n    return 2"
    (tmp_path / "c.py").write_bytes(f"\n{code}<|im_end|>\n".replace("\n", "\r\n").encode())
    assert text.load(f"{tmp_path}/c.py") == [code]
    assert len(text.load(f"{tmp_path}/*.txt,{tmp_path}/a.txt")) == 2, "each file once"
    assert len(text.load(f"{tmp_path}/a.txt, pydoc")) == 1 + len(text.load("pydoc"))


def test_a_file_is_read_once_by_whatever_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a [old].txt").write_text("One line.")
    (tmp_path / "link.txt").symlink_to("a [old].txt")
    assert text.load("a [old].txt") == ["One line."], "the name of a file is no pattern"
    assert text.load(f"a [old].txt,./a [old].txt,{tmp_path}/*.txt,link.txt") == ["One line."]
    assert text.load("pydoc,pydoc") == text.load("pydoc")


def test_load_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        text.load(f"{tmp_path}/nowhere*.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="text file .*empty.txt holds no text; leave it out"):
        text.load(f"{tmp_path}/*.txt")
    (tmp_path / "empty.txt").write_bytes("Latin-1 is r\xe9sum\xe9.".encode("latin-1"))
    with pytest.raises(ValueError, match=r"text file .*empty.txt is not UTF-8 \(byte 12\); convert it or leave it out"):
        text.load(f"{tmp_path}/*.txt")
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder; give a text file, or .* a glob such as '{tmp_path}/\\*.txt'"):
        text.load(str(tmp_path))
    (tmp_path / "empty.txt").write_text("<|im_end|>")
    with pytest.raises(ValueError, match="text file .*empty.txt holds nothing but control tokens; leave it out"):
        text.load(f"{tmp_path}/*.txt")
    with pytest.raises(ValueError, match="empty part"):
        text.load("pydoc,")


def test_sentences():
    prose = 'Mr. Brown left at 3.5 km. "Why?" asked Ann.\n\nNobody knew! He was gone.'
    pieces = text.sentences(prose)
    assert "".join(pieces) == prose
    assert pieces == ["Mr. Brown left at 3.5 km.", ' "Why?" asked Ann.', "\n\nNobody knew!", " He was gone."]


def test_window_starts_at_a_sentence_and_runs_on(texts):
    rng = np.random.default_rng(0)
    corpus = "\n\n".join(texts)
    starts = set()
    for _ in range(50):
        piece = text.window(texts, rng, 400)
        assert len(piece) >= 400
        starts.add(piece[:40])
        at = corpus.index(piece[:40])
        assert at == 0 or corpus[at - 1].isspace()
    assert len(starts) > 40
    assert len(text.window(["One. Two."], rng, 100)) >= 100


def test_fit_ends_at_a_sentence_and_fills():
    pieces = text.sentences(" ".join(f"Sentence {i} has a number of small words in it, as any sentence has." for i in range(20)))
    for budget in range(20, 200, 7):
        body = text.fit(pieces, encode, budget)
        used = sum(len(encode(piece)) for piece in body)
        assert budget - 3 <= used <= budget
        assert body[-1].endswith(".")


def test_join():
    assert text.join(["\n\nA.", "B.", "\n\nx = 1\ny = 2", " C.", "\n\nD."]) == "A. B.\n\nx = 1\ny = 2\n\nC.\n\nD."
    code = "class A:\n    x = 1\n\n    def f(self):\n        return 2"
    assert text.join(text.sentences(code)) == code, "indents stay"


def test_enough_phrasings():
    statements = [one for family in families.FAMILIES.values() for one in family.statements]
    assert len(set(statements)) >= 60
    for name, family in families.FAMILIES.items():
        assert len(family.statements) >= 4 and len(family.questions) >= 3, name
        assert all("{v}" in one and "{k}" in one for one in family.statements), name
        assert all("{k}" in one and "{v}" not in one for one in family.questions), name
        assert all("{v}" in one for one in family.answers), name


def test_drafts_bind_each_question_to_one_value():
    sizes, turns = set(), set()
    for seed in range(1500):
        draft = documents.draft(np.random.default_rng(seed))
        said = " ".join(draft.plants).lower()
        sizes.add(len(draft.values))
        turns.add(len(draft.turns))
        assert len({value.lower() for value in draft.values}) == len(draft.values)
        for value in draft.values:
            assert said.count(value.lower()) == 1, (value, said)
        for question, answer in draft.turns:
            assert sum(value in answer for value in draft.values) == 1, (answer, draft.values)
            assert not any(value.lower() in question.lower() for value in draft.values), (question, draft.values)
    assert sizes == set(range(1, 9))
    assert turns == {2, 3, 4}


def test_answers_are_those_of_their_questions(monkeypatch):
    """And in a quarter of the documents all that is planted is of one kind, with its shared word, so that only the keys tell."""
    made, fact, near = [], documents.fact, 0
    monkeypatch.setattr(documents, "fact", lambda *arguments: made.append(fact(*arguments)) or made[-1])
    for seed in range(600):
        made.clear()
        draft = documents.draft(np.random.default_rng(seed))
        lines = [line.lower() for plant in draft.plants for line in plant.split("\n")]
        planted = [one for one in made if any(one.fields["k"].lower() in line and one.fields["v"].lower() in line for line in lines)]
        kinds = {(one.family, one.fields["u"]) for one in planted if one.family != "record"}
        near += len(planted) >= 4 and len(kinds) == 1
        for question, answer in draft.turns:
            [value] = {one.fields["v"] for one in planted if one.fields["k"].lower() in question.lower()}
            assert value in answer, (question, answer)
    assert near > 100


def test_planted_values_stand_nowhere_else():
    """Prose that holds one is left out: here each second sentence may."""
    drawn = documents.draft(np.random.default_rng(0))
    prose = " ".join(f"Nothing came of it. Somebody wrote {value} on the wall." for value in drawn.values) + " "
    rng = np.random.default_rng(1)
    for _ in range(5):
        context = decode(documents.assemble(drawn, [prose * 200], encode, rng, 500)[0][0]).lower()
        assert "nothing came of it" in context
        for value in drawn.values:
            assert len(re.findall(rf"(?<!\w){re.escape(value.lower())}(?!\w)", context)) == 1


def test_planted_values_stand_in_the_context_once(texts):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        draft = documents.draft(rng)
        parts = documents.assemble(draft, texts, encode, rng, 700)
        assert parts is not None
        context = decode(parts[0][0]).lower()
        assert context.startswith(draft.prefix.lower())
        for value in draft.values:
            assert len(re.findall(rf"(?<!\w){re.escape(value.lower())}(?!\w)", context)) == 1


def test_too_small_for_a_document(texts):
    with pytest.raises(ValueError, match="too short"):
        documents.document(texts, encode, np.random.default_rng(0), 20)
