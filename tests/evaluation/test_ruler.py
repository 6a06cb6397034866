"""RULER's tasks: what they hold, that a reader of context and question alone solves them all, how they are scored, what is refused."""

import collections
import json
import re

import numpy as np
import pytest

from retention.chat import ASK, END, SYSTEM, USER
from retention.evaluation import ruler
from retention.evaluation.ruler_words import ADJECTIVES, NOUNS
from retention.training import text
from retention.training.words import WORDS

TOKEN = re.compile(r"<\|\w+\|>|\s?\w+|\s?[^\w\s]|\s")


def encode(string: str) -> list[int]:
    return [len(token) for token in TOKEN.findall(string)]


def fours(string: str) -> list[int]:
    """Four characters a token: those of pieces do not add up to the text's."""
    return [len(string[i : i + 4]) for i in range(0, len(string), 4)]


TOWNS = [f"{first}{last}" for first in ("Ard", "Bel", "Cor", "Dun", "Elm", "Fal", "Gar", "Hol") for last in ("ham", "ford", "wick", "by", "stow")]
SENTENCES = (
    "It lies by a slow stream.",
    "Few travellers come that way.",
    "The houses are of grey brick, and most of them are old.",
    "Its fair is held in June.",
    "Trains do not stop there any more.",
)
STORY = " ".join(f"In the year of the great frost {who} walked to the coast and back again. Nothing much came of it." for who in ("she", "he")) * 80


def paragraph(i: int) -> str:
    around = " ".join(SENTENCES[i % 5 :] + SENTENCES[: i % 5])
    return f"{around} The mayor of {TOWNS[i]} is called Mayor{i:02}x. {around}"


def write(path, entries):
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file for each QA task; whoever reads the mayor of the town that a question names has its answer."""
    folder = tmp_path_factory.mktemp("files")
    articles = []
    for first in range(0, len(TOWNS), 5):
        paragraphs = [
            {
                "context": paragraph(i),
                "qas": [
                    {"question": f"Who is the mayor of {TOWNS[i]}?", "answers": [{"text": f"Mayor{i:02}x"}, {"text": f"called Mayor{i:02}x"}]},
                    {"question": f"Who is the queen of {TOWNS[i]}?", "answers": [], "is_impossible": True},
                ],
            }
            for i in range(first, first + 5)
        ]
        articles.append({"title": f"Towns {first}", "paragraphs": paragraphs})
    entries = []
    for i in range(0, len(TOWNS) - 1, 2):
        context = [[f"Town {j}", [paragraph(j)]] for j in ((i + k) % len(TOWNS) for k in range(6))]
        context[0] = [f"Twin of {TOWNS[i]}", ["The two towns", f" signed, and {TOWNS[i + 1]} is its twin now."]]
        golden = [[context[0][0], 0], [context[1][0], 2], [context[1][0], 3]]
        asked = f"Who is the mayor of the twin town of {TOWNS[i]}?"
        entries.append({"question": asked, "answer": f"Mayor{i + 1:02}x", "context": context, "supporting_facts": golden})
        entries.append({**entries[-1], "question": "Is there a mayor?", "answer": "yes"})
        entries.append({**entries[-1], "question": f"Who is older, Mayor{i + 1:02}x or Ann?", "answer": f"Mayor{i + 1:02}x"})
    return {"qa_1": write(folder / "squad.json", {"data": articles}), "qa_2": write(folder / "hotpot.json", entries)}


def draw(files, task, length, count, seed, encode=encode, texts=(STORY,)):
    return ruler.samples(task, encode, list(texts), length, count, seed, data=files.get(task))


def needles(context: str) -> list[tuple[str, str]]:
    return re.findall(r"One of the magic (?:number|uuid)s for (\S+) is (\S+)\.", context)


def read(task: str, context: str, question: str) -> list[str]:
    """What a perfect reader answers: from the context and the question alone, by the task's definition."""
    asked = question.split(ASK)[0]
    if task.startswith("niah") or task == "needle_turns":
        return [value for key, value in needles(context) if key in asked]
    if task == "vt":
        [value] = re.findall(r"\d{5}", asked)
        held = {value}
        for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", context):  # in order, as a program runs
            held |= {name} if source in held else set()
        return sorted(held - {value})
    if task == "cwe":
        numbered = re.findall(r"(\d+)\. (\w+)", context)
        assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
        [count] = re.findall(r"\d+", asked)
        return [word for word, _ in collections.Counter(word for _, word in numbered).most_common(int(count))]
    if task == "fwe":
        return [word for word, _ in collections.Counter(re.findall(r"\S+", context.split("\n\n", 1)[1])).most_common(4)][1:]
    if task == "kv_turns":
        [key] = re.findall(r'"([^"]+)"', asked)
        return [json.loads(context[context.index("{") : context.rindex("}") + 1])[key]]
    documents = re.split(r"\n\nDocument \d+:\n", context)
    [town] = [town for town in TOWNS if town in asked]
    if task == "qa_2":
        [twin] = [one for one in documents if one.startswith(f"Twin of {town}\n")]
        [town] = [one for one in TOWNS if f"and {one} is its twin" in twin]
    return re.findall(rf"The mayor of {town} is called (\w+)\.", context)


@pytest.mark.parametrize("length", [512, 2048])
@pytest.mark.parametrize("task", ruler.TASKS)
def test_samples(files, task, length):
    found = draw(files, task, length, 6, seed=5)
    assert found == draw(files, task, length, 6, seed=5)
    assert found != draw(files, task, length, 6, seed=6)
    assert len({sample.context for sample in found}) == 6
    for sample in found:
        assert abs(len(encode(sample.context)) - length) <= 0.02 * length
        assert sample.context.startswith(SYSTEM + USER)
        assert sample.turns == (task in ("kv_turns", "needle_turns"))
        assert len(sample.questions) == len(sample.answers) == (4 if sample.turns else 1)
        for question, answer in zip(sample.questions, sample.answers, strict=True):
            assert question.count(ASK) == 1 and not question[-1].isspace()
            assert len(set(answer)) == len(answer)
            for one in answer:
                assert one in sample.context
                assert not any(one.lower() in question.lower() for question in sample.questions)
            given = read(task, sample.context, question)
            assert task in ruler.QA or sorted(given) == sorted(answer)
            assert ruler.score(task, answer, f"They are {', '.join(given)}.") == 1.0


@pytest.mark.parametrize("task", ruler.TASKS)
def test_lengths_hold_where_tokens_do_not_add_up(files, task):
    for length in (700, 8192) if task not in ruler.QA else (700, 3000):  # the test's files are small
        [sample] = draw(files, task, length, 1, seed=1, encode=fours)
        assert abs(len(fours(sample.context)) - length) <= 0.02 * length


@pytest.mark.parametrize("task", [*ruler.NIAH, "needle_turns", "kv_turns"])
def test_keys_and_values_are_unique(files, task):
    kind = ruler.NIAH.get(task, ruler.Needles("prose"))
    for sample in draw(files, task, 1500, 4, seed=2):
        pairs = needles(sample.context) if task != "kv_turns" else re.findall(r'"(\S+)": "(\d+)"', sample.context)
        keys, values = zip(*pairs, strict=True)
        assert len(set(values)) == len(values) and len(set(keys)) * kind.values == len(keys)
        assert all(sample.context.count(value) == 1 for value in values)
        assert all(sample.context.count(key) == kind.values for key in keys)
        pattern = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
        assert all(re.fullmatch(pattern if kind.kind == "uuid" else r"\d{7}", value) for value in values)
        assert all(re.fullmatch(pattern if task == "niah_multikey_3" else r"[a-z]+-[a-z]+", key) for key in keys)
        wanted = {"needle_turns": 4, "niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
        assert len(pairs) == wanted[task] if task in wanted else len(pairs) == 1 or kind.haystack == "needles" or task == "kv_turns"
        if kind.haystack == "needles" or task == "kv_turns":
            assert len(pairs) > 30
        assert [len(answer) for answer in sample.answers] == ([1] * 4 if sample.turns else [kind.asked * kind.values])


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "qa_1"])
def test_depths_cover_the_context(files, task):
    found = draw(files, task, 1500, 12, seed=0)
    depths = sorted(sample.context.index(sample.answers[0][0]) / len(sample.context) for sample in found)
    assert depths[0] < 0.25 and depths[-1] > 0.8
    assert max(np.diff(depths)) < 0.3


def test_variables_are_one_chain_in_order(files):
    for sample in draw(files, "vt", 1000, 4, seed=0):
        pairs = re.findall(r"VAR (\w+) = ((?:VAR )?\w+)\.", sample.context)
        names = [name for name, _ in pairs]
        assert tuple(names) == sample.answers[0] and len(names) == 5
        assert [source for _, source in pairs][1:] == [f"VAR {name}" for name in names[:-1]]
        assert sample.context.count(pairs[0][1]) == 1
        assert [sample.context.count(name) for name in names] == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("length, words, once", [(400, 8, 1), (512, 10, 1), (1024, 10, 2), (2048, 10, 3), (20_000, 10, 3)])
def test_common_words_stand_ten_times_as_often(files, length, words, once):
    [sample] = draw(files, "cwe", length, 1, seed=3)
    counts = collections.Counter(re.findall(r"\d\. (\w+)", sample.context))
    common = sample.answers[0]
    assert len(common) == words and f"Which {words} words" in sample.questions[0]
    assert {counts.pop(word) for word in common} == {10 * once}
    assert set(counts.values()) == {once} and len(counts) >= 10
    assert not any(one in other for one in common for other in counts)
    assert (set(counts) <= {*ADJECTIVES, *NOUNS}) == (length < 20_000)  # coined words only where the list runs out


def test_frequent_words_follow_zeta(files):
    [sample] = draw(files, "fwe", 8192, 1, seed=0)
    ranked = collections.Counter(sample.context.split("\n\n", 1)[1].split()).most_common()
    assert ranked[0][0] == "...." and tuple(word for word, _ in ranked[1:4]) == sample.answers[0]
    for rank in range(2, 10):
        assert ranked[rank - 1][1] == pytest.approx(ranked[0][1] / rank**2, abs=1)
    assert ranked[-1][1] == 1 and len(ranked) > 30


def test_documents(files):
    for task in ruler.QA:
        for sample in draw(files, task, 1000, 8, seed=4):
            documents = re.split(r"\n\nDocument (\d+):\n", sample.context)
            assert documents[1::2] == [str(i + 1) for i in range(len(documents) // 2)] and len(documents) > 5
            assert len(set(documents[2::2])) == len(documents[2::2])
            holding = [one for one in documents[2::2] if sample.answers[0][0] in one]
            assert len(holding) == 1  # no distractor holds the answer
    sample = draw(files, "qa_1", 512, 1, seed=0)[0]
    asked = next(i for i, town in enumerate(TOWNS) if town in sample.questions[0])
    assert sample.answers == ((f"Mayor{asked:02}x", f"called Mayor{asked:02}x"),)
    article = {town for town in TOWNS if f"of {town} is" in sample.context}
    assert article <= set(TOWNS[asked // 5 * 5 :][:5])  # distractors of the same article come first


def test_no_distractor_holds_the_answer(tmp_path):
    asked = {"question": "Who is the mayor of Ardham?", "answers": [{"text": "Rowe"}]}
    own = {"context": "The mayor of Ardham is Rowe. " + "It is an old town. " * 5, "qas": [asked]}
    hints = [{"context": f"Rowe wrote letter {n}. " + "It was a long one. " * 8, "qas": []} for n in range(15)]
    others = [{"context": f"Letter {n} was lost. " + "Nobody missed it. " * 8, "qas": []} for n in range(60)]
    files = {"qa_1": write(tmp_path / "squad.json", {"data": [{"title": "Letters", "paragraphs": [own, *hints, *others]}]})}
    [sample] = draw(files, "qa_1", 700, 1, seed=0)
    assert sample.context.count("Rowe") == 1 and sample.context.count("was lost") > 5


def test_turns(files):
    [dialogue] = draw(files, "needle_turns", 1000, 1, seed=0)
    told = dialogue.context.removeprefix(SYSTEM).split("\n" + USER)
    assert len(told) == 4 and all(len(needles(turn)) == 1 and turn.count(ASK) == 1 and turn.endswith(END) for turn in told)
    assert all(question.startswith("\n" + USER) for question in dialogue.questions)
    orders = [[sample.context.index(answer[0]) for answer in sample.answers] for sample in draw(files, "needle_turns", 1000, 6, seed=0)]
    assert any(order != sorted(order) for order in orders)
    [table] = draw(files, "kv_turns", 1000, 1, seed=0)
    assert table.questions[0].startswith("\n\nWhat") and all(question.startswith("\n" + USER) for question in table.questions[1:])


@pytest.mark.parametrize("task", sorted(ruler.PROSE))
def test_prose_of_a_real_source(task):
    for sample in ruler.samples(task, encode, text.load("pydoc"), 1000, 3, seed=0):
        assert abs(len(encode(sample.context)) - 1000) <= 20
        for question, answer in zip(sample.questions, sample.answers, strict=True):
            assert sorted(read(task, sample.context, question)) == sorted(answer)


def test_prose_with_a_planted_key_or_value_is_left_out(files):
    [sample] = draw(files, "niah_single_2", 600, 1, seed=0)
    [(key, value)] = needles(sample.context)
    texts = [f"Some speak of {key.upper()} all day. Others add up to {value} in the end. {STORY}"]
    for sample in draw(files, "niah_single_2", 600, 1, seed=0, texts=texts * 3):
        assert needles(sample.context) == [(key, value)]
        assert sample.context.lower().count(key) == sample.context.count(value) == 1


def test_words():
    words = ADJECTIVES + NOUNS
    assert len(set(words)) == len(words)
    assert not any(one in other for one in words for other in words if one != other)
    trained = {part.lower() for entries in WORDS.values() for entry in entries for part in re.findall(r"[\w'-]+", entry)}
    assert not trained & set(words)


@pytest.mark.parametrize(
    "task, answer, generated, expected",
    [
        ("niah_single_1", ("1234567",), "The number is 1234567.", 1.0),
        ("niah_single_1", ("1234567",), "1234568", 0.0),
        ("niah_single_3", ("0a1b",), "0A1B", 1.0),
        ("niah_multivalue", ("11", "22", "33", "44"), "44, 22 and 11", 0.75),
        ("vt", ("ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"), "ABCDE", 0.2),
        ("cwe", ("oak", "elm"), "1. elm 2. oak", 1.0),
        ("fwe", ("a", "b", "c"), "", 0.0),
        ("qa_1", ("three", "3 of them"), "There are Three.", 1.0),
        ("qa_2", ("Ann", "Anne B"), "Bob", 0.0),
        ("kv_turns", ("77",), "77", 1.0),
    ],
)
def test_score(task, answer, generated, expected):
    assert ruler.score(task, answer, generated) == pytest.approx(expected)


def test_errors(files):
    with pytest.raises(ValueError, match="unknown task 'niah_single': did you mean niah_single_"):
        ruler.samples("niah_single", encode, [STORY], 1000, 1, seed=0)
    with pytest.raises(ValueError, match="unknown task 'x': known are niah_single_1, "):
        ruler.score("x", ("1",), "1")
    for texts in ([], [""]):
        with pytest.raises(ValueError, match="niah_multiquery needs prose"):
            ruler.samples("niah_multiquery", encode, texts, 1000, 1, seed=0)
    assert ruler.samples("niah_single_1", encode, [], 1000, 1, seed=0)
    with pytest.raises(ValueError, match="do not fill"):
        ruler.samples("niah_single_2", encode, ["x" * 9000], 1000, 1, seed=0)
    with pytest.raises(ValueError, match="qa_2 needs data, the path of a HotpotQA file"):
        ruler.samples("qa_2", encode, [STORY], 1000, 1, seed=0)
    with pytest.raises(ValueError, match="file's documents do not fill 90000 tokens"):
        draw(files, "qa_1", 90_000, 1, seed=0)
    with pytest.raises(ValueError, match="the file of qa_1 has 40 questions whose own .* of 1000 tokens, and config.samples asks for 41; ask for no more"):
        draw(files, "qa_1", 1000, 41, seed=0)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_too_short(files, task):
    with pytest.raises(ValueError, match=f"length 60 is too short for {task}: "):
        draw(files, task, 60, 1, seed=0)


ENTRY = {"question": "Who?", "answer": "Ann", "context": [["A", ["Ann."]]], "supporting_facts": [["A", 0]]}
QAS = {"question": "Who?", "answers": [{"text": "Ann"}]}


@pytest.mark.parametrize(
    "task, content, message",
    [
        ("qa_1", "{", "is not JSON"),
        ("qa_1", "\xff", "is not JSON"),
        ("qa_1", [], "the file has no field 'data' with a list"),
        ("qa_1", {"data": [{"title": "A"}]}, r"data\[0\] has no field 'paragraphs' with a list"),
        ("qa_1", {"data": [{"paragraphs": [{"qas": []}]}]}, r"data\[0\].paragraphs\[0\] has no field 'context' with a text"),
        ("qa_1", {"data": [{"paragraphs": [{"context": "Ann."}]}]}, "has no field 'qas' with a list"),
        ("qa_1", {"data": [{"paragraphs": [{"context": "Ann.", "qas": [{"question": "Who?"}]}]}]}, r"qas\[0\] has no field 'answers'"),
        ("qa_1", {"data": [{"paragraphs": [{"context": "Ann.", "qas": [{**QAS, "answers": [{}]}]}]}]}, r"answers\[0\] has no field 'text'"),
        ("qa_1", {"data": [{"paragraphs": [{"context": "Bob.", "qas": [QAS]}]}]}, "has no question whose answer stands"),
        ("qa_2", {"data": []}, "must hold a list of questions, not dict"),
        ("qa_2", [ENTRY, {"question": "Who?"}], "entry 1 has no field 'context' with a list"),
        ("qa_2", [{**ENTRY, "context": [["A", "Ann."]]}], r"context\[0\] of entry 0 is not a title and a list of sentences"),
        ("qa_2", [{**ENTRY, "supporting_facts": [["B", 0]]}], r"supporting_facts\[0\] of entry 0 does not begin with a title"),
        ("qa_2", [{**ENTRY, "answer": None}], "entry 0 has no field 'answer' with a text"),
        ("qa_2", [{**ENTRY, "answer": "yes"}], "has no question whose answer stands"),
    ],
)
def test_malformed_files(tmp_path, task, content, message):
    path = tmp_path / "questions.json"
    path.write_bytes(content.encode("latin-1") if isinstance(content, str) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=rf"questions\.json.*{message}") as error:
        ruler.samples(task, encode, [], 1000, 1, seed=0, data=path)
    assert "\n" not in str(error.value)
