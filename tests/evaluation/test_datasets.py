"""Benchmark files in their published form, written here, and what is said of those that are not in it."""

import json
import re

import pytest

from retention.evaluation import datasets

SESSIONS = [[{"role": "user", "content": "I was born in Rome."}, {"role": "assistant", "content": "How nice!"}]]
MEMORY = {
    "question_id": "q1", "question_type": "multi-session", "question": "Where was I born?", "answer": "Rome", "question_date": "2023/05/30",
    "haystack_dates": ["2023/05/20"], "haystack_sessions": SESSIONS,
}  # fmt: skip
LONGBENCH = {"input": "Who?", "context": "Ann did it.", "answers": ["Ann", "Ann B."], "all_classes": None, "length": 3, "dataset": "qasper"}
CHOICES = {f"choice_{letter}": f"{letter}!" for letter in "ABCD"}
RECORDS = {
    "gsm8k": {"question": "What is 3 + 4?", "answer": "3 + 4 = 7\n#### 7"},
    "math500": {"problem": "Halve $x$.", "solution": "...", "answer": r"\frac{x}{2}", "level": 5},
    "aime24": {"id": 60, "problem": "Which?", "answer": "073", "url": "..."},
    "aime25": {"problem": "Which?", "answer": 73, "id": "0"},
    "longproc_countdown_0.5k": {"nums": [1, 2], "target": 3, "solution_text": "1 + 2 = 3", "demonstration": "..."},
    "longproc_html_to_tsv_0.5k": {
        "html_path": "page.html", "task_topic": "Prices", "task_description": "(1) name", "gt": "name\nLamp", "tsv_header": "name", "filtering_instruction": "",
    },
    "longproc_path_traversal_0.5k": {"context_nl": "A leads to B by bus.", "question_repr": ["A", "B"], "answer_nl": "From A, take a bus to B."},
    "longproc_pseudo_to_code_0.5k": {"pseudocode_lines": ["print 1"], "code_lines": ["int main() {}"], "testcases": [[[""], ["1"]]]},
    "longproc_tom_tracking_0.5k": {"story": "Step 0: ...", "question": "Where is it?", "solution": "- Step 0: {}", "answer": ["{}"]},
    "longbench_qasper": LONGBENCH,
    "longbench_trec_e": {**LONGBENCH, "all_classes": ["Ann", "Bob"]},
    "longbench_v2": {"question": "Who?", "context": "Ann did it.", "answer": "B", **CHOICES},
    "longmemeval_s": MEMORY,
}  # fmt: skip
ANSWERS = {
    "gsm8k": "7", "math500": r"\frac{x}{2}", "aime24": "073", "aime25": "73", "longproc_countdown_0.5k": "1 + 2 = 3", "longbench_v2": "B",
    "longproc_html_to_tsv_0.5k": "name\nLamp", "longproc_path_traversal_0.5k": "From A, take a bus to B.", "longmemeval_s": "Rome",
    "longproc_pseudo_to_code_0.5k": "int main() {}", "longproc_tom_tracking_0.5k": "- Step 0: {}", "longbench_qasper": "Ann", "longbench_trec_e": "Ann",
}  # fmt: skip


def write(folder, task, *records, name=0):
    path = folder / datasets.TASKS[task][0][name]
    path.parent.mkdir(exist_ok=True)
    (path.parent / "page.html").write_text("<p>Lamp</p>")
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n" if path.suffix == ".jsonl" else json.dumps(records))
    return path


@pytest.mark.parametrize("task", RECORDS)
def test_samples(tmp_path, task):
    write(tmp_path, task, RECORDS[task], RECORDS[task])
    samples = datasets.load(task, tmp_path)
    assert len(samples) == 2 and samples[0] == samples[1]
    assert samples[0].answers[0] == ANSWERS[task] and samples[0].question
    assert bool(samples[0].context) != task.startswith(("gsm8k", "math500", "aime"))
    for name in ("problem", "question", "input"):
        assert RECORDS[task].get(name, "") in samples[0].question
    for name in ("context", "context_nl", "story"):
        assert RECORDS[task].get(name, "") in samples[0].context


@pytest.mark.parametrize("task", RECORDS)
def test_every_missing_column_is_named(tmp_path, task):
    (tmp_path / "page.html").write_text("<p>Lamp</p>")
    unused = {"level", "url", "id", "length", "dataset", "demonstration"} | ({"solution"} if task == "math500" else set())
    unused |= {"answer"} if "tom_tracking" in task else set()
    unused |= {"all_classes"} if task == "longbench_qasper" else set()
    for column in RECORDS[task].keys() - unused:
        path = write(tmp_path, task, RECORDS[task], {name: value for name, value in RECORDS[task].items() if name != column})
        with pytest.raises(ValueError) as caught:
            datasets.load(task, tmp_path)
        assert str(caught.value).startswith(f"{path}, record 2: has no column {column!r}, only ")


def test_published_names_of_files(tmp_path):
    for task in ("longproc_countdown_0.5k", "longbench_qasper", "math500", "longmemeval_s"):
        write(tmp_path, task, RECORDS[task], name=1)
        assert len(datasets.load(task, str(tmp_path))) == 1


def test_what_the_samples_hold(tmp_path):
    write(tmp_path, "longbench_v2", RECORDS["longbench_v2"])
    assert "(A) A!\n(B) B!\n(C) C!\n(D) D!" in datasets.load("longbench_v2", tmp_path)[0].question
    either = "7 days. 8 days (including the last day) is also acceptable."
    changes = {"question_id": "q2_abs"}, {"question_type": "single-session-preference"}, {"answer": 3}, {"answer": either}
    write(tmp_path, "longmemeval_s", MEMORY, *({**MEMORY, **change} for change in changes))
    samples = datasets.load("longmemeval_s", tmp_path)
    wanted = [("Rome",), ("I do not know", "I don't know"), ("3",), ("7 days", "8 days")]
    assert [sample.answers for sample in samples] == wanted, "the preference is left out"
    sessions = [[{"role": "user", "content": said}] for said in "BA"]
    dates = ["2023/05/25 (Thu) 09:00", "2023/05/20 (Sat) 02:21"]
    write(tmp_path, "longmemeval_oracle", {**MEMORY, "haystack_sessions": sessions, "haystack_dates": dates})
    [sample] = datasets.load("longmemeval_oracle", tmp_path)
    assert re.findall("user: (.)", sample.context) == ["A", "B"], "by date, as its authors read them"
    assert "2023/05/20\nuser: I was born in Rome.\nassistant: How nice!" in samples[0].context and "2023/05/30" in samples[0].question
    write(tmp_path, "longproc_countdown_0.5k", RECORDS["longproc_countdown_0.5k"])
    assert datasets.load("longproc_countdown_0.5k", tmp_path)[0].extra == {"numbers": [1, 2], "target": 3}
    write(tmp_path, "longbench_trec_e", RECORDS["longbench_trec_e"])
    assert datasets.load("longbench_trec_e", tmp_path)[0].extra == {"classes": ["Ann", "Bob"]}


@pytest.mark.parametrize(
    "task, changes, message",
    [
        ("gsm8k", {"answer": "7"}, "column 'answer' has nothing behind '####'"),
        ("gsm8k", {"question": 7}, "column 'question' holds 7, which is no str"),
        ("math500", {"answer": " "}, "column 'answer' is blank"),
        ("aime24", {"answer": "1000"}, "column 'answer' holds '1000', which is no integer from 0 to 999"),
        ("aime24", {"answer": True}, "column 'answer' holds true, which is no int or str"),
        ("longproc_countdown_0.5k", {"nums": ["1"]}, "column 'nums' is no list of integers, or an empty one"),
        ("longproc_html_to_tsv_0.5k", {"html_path": "no.html"}, "no.html of column 'html_path' cannot be read"),
        ("longproc_html_to_tsv_0.5k", {"gt": "name\n"}, "column 'gt' has no row of as many cells as its header"),
        ("longproc_html_to_tsv_0.5k", {"gt": "name\nLamp\t5"}, "column 'gt' has no row of as many cells as its header"),
        ("longproc_html_to_tsv_0.5k", {"gt": "name\n" + '"' + "x" * 200_000}, "column 'gt' is no table of tab-separated values (field larger than"),
        ("longproc_tom_tracking_0.5k", {"solution": "Step 0: {}"}, "column 'solution' has no line that begins with '- Step' and a number"),
        ("longproc_path_traversal_0.5k", {"question_repr": ["A"]}, "column 'question_repr' has 1 cities where it needs the start and the end"),
        ("longproc_pseudo_to_code_0.5k", {"testcases": [["1"]]}, "column 'testcases' is no list of pairs"),
        ("longbench_qasper", {"answers": []}, "column 'answers' is no list of strings, or an empty one"),
        ("longbench_trec_e", {"all_classes": None}, "column 'all_classes' holds null, which is no list"),
        ("longbench_v2", {"answer": "E"}, "column 'answer' holds 'E', which is none of A, B, C and D"),
        ("longmemeval_s", {"haystack_dates": []}, "columns 'haystack_sessions' and 'haystack_dates' have 1 and 0 entries"),
        ("longmemeval_s", {"haystack_sessions": [[{"role": "user"}]]}, "column 'haystack_sessions' is no list of conversations"),
    ],
)
def test_malformed_columns(tmp_path, task, changes, message):
    path = write(tmp_path, task, {**RECORDS[task], **changes})
    with pytest.raises(ValueError) as caught:
        datasets.load(task, tmp_path)
    assert str(caught.value).startswith(f"{path}, record 1: ") and message in str(caught.value)


@pytest.mark.parametrize(
    "task, raw, message",
    [
        ("gsm8k", b"", "holds no record"),
        ("gsm8k", b"\n\n", "holds no record"),
        ("gsm8k", b'{"question"\n', ", record 1: is no valid JSON"),
        ("gsm8k", b'\n{"question": "Q", "answer": "#### 1"}\n[1]\n', ", record 3: is no JSON object"),
        ("gsm8k", b"\xff\n", "is not UTF-8 (byte 0)"),
        ("longbench_v2", b"", "holds no record"),
        ("longbench_v2", b"[]", "holds no record"),
        ("longbench_v2", b'{"data": []}', "holds a dict where a list of records is needed"),
        ("longbench_v2", b"[" * 100_000, "is no valid JSON"),
        ("longbench_v2", b"[1]", ", record 1: is no JSON object"),
    ],
)
def test_malformed_files(tmp_path, task, raw, message):
    path = tmp_path / datasets.TASKS[task][0][0]
    path.write_bytes(raw)
    with pytest.raises(ValueError) as caught:
        datasets.load(task, tmp_path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


def test_unknown_tasks_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'longbench_v3': did you mean longbench_v2"):
        datasets.load("longbench_v3", tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no file of gsm8k: looked for gsm8k_test.jsonl and gsm8k/test.jsonl"):
        datasets.load("gsm8k", tmp_path)
