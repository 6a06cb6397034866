"""The training documents and their pipeline, on a small word-level tokenizer and CPython's own manual."""

import re

import grain
import numpy as np
import pytest

from retention.training import data, documents, families, text

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


def test_load_files_undoes_line_breaks_and_drops_control_strings(tmp_path):
    (tmp_path / "a.txt").write_text("One line\nand the next.\n\n\nA new<|im_end|> paragraph.")
    (tmp_path / "b.txt").write_text("Second file.")
    assert text.load(f"{tmp_path}/*.txt") == ["One line and the next.\n\nA new paragraph.", "Second file."]
    assert len(text.load(f"{tmp_path}/a.txt, pydoc")) == 1 + len(text.load("pydoc"))


def test_load_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        text.load(f"{tmp_path}/nowhere*.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="no text"):
        text.load(f"{tmp_path}/empty.txt")
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


@pytest.mark.parametrize("length", [256, 512])
def test_item(texts, length):
    source = data.Documents(encode, texts, length=length, targets=192)
    plain = 0
    for index in range(80):
        item = source[index]
        size = int(item["length"])
        tokens, targets, answer, valid = item["tokens"], item["targets"], item["answer"], item["valid"]
        assert (tokens.shape, tokens.dtype) == ((length,), np.int32)
        assert (targets.shape, targets.dtype) == ((192,), np.int32)
        assert answer.dtype == valid.dtype == bool and answer.shape == valid.shape == (192,)
        assert item["length"].dtype == np.int32
        assert 0.9 * length <= size <= length
        assert (tokens[:size] > 0).all() and (tokens[size:] == 0).all()
        assert (targets >= 0).all() and (targets[valid] < size - 1).all()
        assert len(set(targets[valid])) == valid.sum()
        assert not (answer & ~valid).any() and (targets[~valid] == 0).all()
        # The answer targets are exactly the assistant's turns with their ends.
        whole = decode(tokens[:size])
        turns = re.findall(r"(?<=<\|im_start\|>assistant\n).*?<\|im_end\|>", whole, re.DOTALL)
        assert decode(tokens[np.sort(targets[answer]) + 1]) == "".join(turns)
        others = int((valid & ~answer).sum())
        if turns:
            assert 64 <= others <= 160
        else:
            plain += 1
            assert others == 192
    assert 3 <= plain <= 25


def test_answers_beyond_half_the_targets_are_dropped(texts):
    source = data.Documents(encode, texts, length=512, targets=20, plain_share=0.0)
    full = data.Documents(encode, texts, length=512, targets=400, plain_share=0.0)
    for index in range(10):
        few, many = source[index], full[index]
        assert few["answer"].sum() == min(10, many["answer"].sum())
        assert few["valid"].all()
        assert set(few["targets"][few["answer"]]) <= set(many["targets"][many["answer"]])


def test_items_depend_on_seed_and_index_alone(texts):
    first, again, other = (data.Documents(encode, texts, length=256, seed=seed) for seed in (1, 1, 2))
    first[7], first[3]
    for name, value in first[9].items():
        np.testing.assert_array_equal(value, again[9][name])
    assert not np.array_equal(first[9]["tokens"], other[9]["tokens"])
    assert not np.array_equal(first[9]["tokens"], first[10]["tokens"])


def test_plain_share(texts):
    assert not any(data.Documents(encode, texts, 256, plain_share=1.0)[i]["answer"].any() for i in range(8))
    assert all(data.Documents(encode, texts, 256, plain_share=0.0)[i]["answer"].any() for i in range(8))


def test_source_errors(texts):
    with pytest.raises(ValueError, match="texts"):
        data.Documents(encode, [])
    with pytest.raises(ValueError, match="length"):
        data.Documents(encode, texts, length=100)
    with pytest.raises(ValueError, match="targets"):
        data.Documents(encode, texts, targets=1)
    with pytest.raises(ValueError, match="plain_share"):
        data.Documents(encode, texts, plain_share=1.5)
    with pytest.raises(ValueError, match="batch_size"):
        data.batches(data.Documents(encode, texts), 0, seed=0)


def test_source_fits_grain(texts):
    source = data.Documents(encode, texts)
    assert isinstance(source, grain.sources.RandomAccessDataSource)
    assert len(source) == 10_000_000


def test_batches_resume_exactly(texts):
    source = data.Documents(encode, texts, length=256)
    iterator = iter(data.batches(source, 4, seed=3))
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(2)]
    assert expected[0]["tokens"].shape == (4, 256) and expected[0]["length"].shape == (4,)

    resumed = iter(data.batches(source, 4, seed=3))
    resumed.set_state(state)
    skipped = iter(data.batches(source, 4, seed=3, start=12))
    for batch in expected:
        for one in (next(resumed), next(skipped)):
            for name, value in batch.items():
                np.testing.assert_array_equal(one[name], value)
    assert not np.array_equal(next(iter(data.batches(source, 4, seed=4)))["tokens"], next(iter(data.batches(source, 4, seed=3)))["tokens"])
