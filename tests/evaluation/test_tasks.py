"""Every task through its one door: what is read and asked, what scores, and what is missing."""

import json

import pytest

from retention.chat import ASK, SYSTEM, USER
from retention.evaluation import datasets, needles, ruler, tasks
from retention.training import text
from tests.evaluation.test_datasets import RECORDS, write
from tests.evaluation.test_needles import encode


@pytest.fixture(scope="module")
def texts():
    return text.load("pydoc")


def load(name, texts=(), count=3, data=None, execute=False, seed=0):
    return tasks.load(name, encode, texts, 800, count, seed, data, execute)


def test_names_are_unique_and_nearest_ones_are_offered():
    assert len(set(tasks.NAMES)) == len(tasks.NAMES) == 3 + 15 + 1 + len(datasets.TASKS)
    assert [name for name in ("needle", "vt", "prose", "gsm8k", "longbench_v2") if tasks.has_length(name)] == ["needle", "vt", "prose"]
    with pytest.raises(ValueError, match="unknown task 'niah_single': did you mean niah_single_"):
        tasks.check("niah_single")


@pytest.mark.parametrize("name", [*needles.TASKS, *(name for name in ruler.TASKS if name not in ruler.QA)])
def test_its_own_answers_score_full_marks_and_none_scores_nothing(texts, name):
    task = load(name, texts)
    assert len(task.samples) == 3
    for index, sample in enumerate(task.samples):
        for number, answer in enumerate(sample.answers):
            assert task.score(index, number, " and ".join([answer] if isinstance(answer, str) else answer)) == {"score": 1}
            assert task.score(index, number, "nothing") == {"score": 0}


def squad_file(folder, name):
    articles = [
        {"context": f"{town} lies on the river {river}. " + "It has a bridge. " * 15, "qas": [{"question": f"Where is {town}?", "answers": [{"text": river}]}]}
        for town, river in (("Alpha", "Moss"), ("Beta", "Elder"), ("Gamma", "Willow"))
    ]
    filler = [{"context": f"Paragraph {i} is of no use. " + "Nothing happens here. " * 10, "qas": []} for i in range(60)]
    (folder / name).write_text(json.dumps({"data": [{"paragraphs": [*articles, *filler]}]}))


def test_questions_over_documents_find_their_file_in_the_folder(tmp_path):
    squad_file(tmp_path, "dev-v2.0.json")
    task = load("qa_1", data=str(tmp_path))
    assert {sample.answers for sample in task.samples} == {(("Moss",),), (("Elder",),), (("Willow",),)}
    assert task.score(0, 0, task.samples[0].answers[0][0]) == {"score": 1} and task.longest_answer(encode) == 1
    with pytest.raises(FileNotFoundError, match="holds no file of qa_2: looked for hotpotqa.json and hotpot_dev_distractor_v1.json"):
        load("qa_2", data=str(tmp_path))


@pytest.mark.parametrize("name", [name for name in RECORDS if "pseudo" not in name])
def test_benchmarks(tmp_path, name):
    write(tmp_path, name, RECORDS[name])
    task = load(name, count=1, data=str(tmp_path))
    [sample], [problem] = task.samples, task.problems
    assert sample.context == SYSTEM + USER + problem.context and sample.questions == (("\n\n" if problem.context else "") + problem.question + ASK,)
    assert sample.answers == (problem.answers,) and not sample.turns
    right = {
        "longproc_countdown_0.5k": "<Solution>\n1 + 2 = 3\n</Solution>", "longproc_path_traversal_0.5k": f"<Route>\n{problem.answers[0]}\n</Route>",
        "longbench_v2": "The correct answer is (B)", "math500": rf"\boxed{{{problem.answers[0]}}}", "aime24": r"\boxed{73}", "aime25": r"\boxed{73}",
    }  # fmt: skip
    scores = task.score(0, 0, right.get(name, problem.answers[0]))
    assert scores["score"] == 1 and list(scores)[0] == "score"


def test_a_record_cannot_end_the_turn(tmp_path):
    write(tmp_path, "longbench_v2", {**RECORDS["longbench_v2"], "context": "It said <|im_end|> here.", "question": "What<|im_start|>?"})
    [sample] = load("longbench_v2", count=1, data=str(tmp_path)).samples
    assert sample.context == SYSTEM + USER + "It said  here."
    assert sample.questions[0].startswith("\n\nWhat?") and sample.questions[0].count("<|") == ASK.count("<|")


def test_a_seed_picks_the_problems_and_leaves_their_order(tmp_path):
    write(tmp_path, "gsm8k", *({"question": f"Number {i:02}?", "answer": f"#### {i}"} for i in range(30)))
    picks = [[problem.answers[0] for problem in load("gsm8k", count=8, data=str(tmp_path), seed=seed).problems] for seed in (0, 0, 1)]
    assert picks[0] == picks[1] != picks[2] and len(set(picks[0])) == 8
    assert all(pick == sorted(pick, key=int) for pick in picks)
    assert [problem.answers[0] for problem in load("gsm8k", count=30, data=str(tmp_path)).problems] == [str(i) for i in range(30)]
    with pytest.raises(ValueError, match="gsm8k has 30 problems and config.samples asks for 31"):
        load("gsm8k", count=31, data=str(tmp_path))


def test_what_a_metric_needs_is_missed_before_anything_runs(tmp_path, monkeypatch):
    name = "longproc_pseudo_to_code_0.5k"
    write(tmp_path, name, RECORDS[name])
    with pytest.raises(ValueError, match="pass execute=True where that may be done"):
        load(name, count=1, data=str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(FileNotFoundError, match="needs the compiler g[+][+]"):
        load(name, count=1, data=str(tmp_path), execute=True)
    write(tmp_path, "math500", RECORDS["math500"])
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    monkeypatch.setattr(tasks.metrics.math_answers, "_worker", tasks.metrics.math_answers._Worker())
    with pytest.raises(ImportError, match="needs sympy"):
        load("math500", count=1, data=str(tmp_path))


def test_the_question_in_the_context(texts):
    task = load("needle4", texts)
    known = tasks.seen(task)
    for i, (before, after) in enumerate(zip(task.samples, known.samples, strict=True)):
        asked = i % 4
        assert after.context == before.context + before.questions[asked] and after.questions == ("",) and after.answers == (before.answers[asked],)
    assert [known.score(1, 0, answer)["score"] for answer in task.samples[1].answers] == [0, 1, 0, 0]
    with pytest.raises(ValueError, match="question_seen makes no sense for needle_turns"):
        tasks.seen(load("needle_turns", texts))
