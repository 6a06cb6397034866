"""Benchmarks read from local files in the form in which their authors published them: contexts, questions, accepted answers.

  gsm8k, math500, aime24, aime25               JSON lines of problems, all in the question; the context is empty
  longproc_KIND_SIZE                           KIND countdown, html_to_tsv, path_traversal, pseudo_to_code (but 8k) or tom_tracking, SIZE 0.5k, 2k or 8k
  longbench_NAME, longbench_NAME_e             LongBench's data sets and those of LongBench-E
  longbench_v2                                 one JSON file
  longmemeval_s, longmemeval_m, longmemeval_oracle

The wording around a record is ours, without examples, and the question stands behind the context: figures are not those of the authors' prompts.
Of LongBench's contexts (v2 too) that are longer than the model knows positions the harness leaves out the middle, as the authors do, and a row's dropped_tokens
says how much; no other's, and beyond the positions that it was trained for a model is warned of.
LongProc's travel_planning is not read.
"""

import csv
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retention.evaluation import longproc
from retention.names import check_name


@dataclass(frozen=True)
class Problem:
    """One record.

    context: what is read before the question is known, without chat wrapper. question: what to ask then. answers: those that the benchmark
    accepts. extra: what its metric needs besides them.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)


def load(task: str, folder: str | Path) -> list[Problem]:
    """All samples of `task`, one of TASKS, from its file in `folder`, in the file's order.

    Raises ValueError for an unknown task, and for a file or record that is not as published, with its path, its number (from 1; of a line in JSON lines)
    and what is wrong; FileNotFoundError where there is no such file, with the names under which it was looked for.
    """
    check_name("task", task, TASKS)
    names, sample = TASKS[task]
    path = find(task, names, folder)
    samples = [one for record in _records(path) if (one := sample(record)) is not None]
    if not samples:
        raise ValueError(f"{path} holds no record")
    return samples


def find(task: str, names: Sequence[str], folder: str | Path) -> Path:
    """The first file of these names in `folder`. Raises FileNotFoundError, which says what was looked for."""
    path = next((path for name in names if (path := Path(folder).expanduser() / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"the folder {folder} holds no file of {task}: looked for {' and '.join(names)}")
    return path


@dataclass(frozen=True)
class _Record:
    """A JSON object, with the place that it came from."""

    path: Path
    number: int
    columns: dict[str, Any]

    def wrong(self, what: str) -> ValueError:
        return ValueError(f"{self.path}, record {self.number}: {what}")

    def get(self, name: str, *types: type) -> Any:
        """The value of a column. Raises ValueError where the record lacks it or its type is another."""
        if name not in self.columns:
            raise self.wrong(f"has no column {name!r}, only {', '.join(map(repr, self.columns)) or 'none'}")
        value = self.columns[name]
        if not isinstance(value, types) or isinstance(value, bool):
            raise self.wrong(f"column {name!r} holds {json.dumps(value)[:40]}, which is no {' or '.join(one.__name__ for one in types)}")
        return value

    def text(self, name: str) -> str:
        """A string that is not blank."""
        value = self.get(name, str)
        if not value.strip():
            raise self.wrong(f"column {name!r} is blank")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings, at least one."""
        value = self.get(name, list)
        if not value or not _is_texts(value):
            raise self.wrong(f"column {name!r} is no list of strings, or an empty one")
        return value


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _records(path: Path) -> Iterator[_Record]:
    """The objects of a file of JSON lines (.jsonl) or of one JSON list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from None
    if path.suffix == ".jsonl":
        objects = ((number, _json(path, line, f", record {number}:")) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    else:
        whole = _json(path, text, "") if text.strip() else []
        if not isinstance(whole, list):
            raise ValueError(f"{path} holds a {type(whole).__name__} where a list of records is needed")
        objects = enumerate(whole, 1)
    for number, columns in objects:
        if not isinstance(columns, dict):
            raise ValueError(f"{path}, record {number}: is no JSON object")
        yield _Record(path, number, columns)


def _json(path: Path, text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}{place} is no valid JSON ({error})") from None


# Mathematics.

_BOX = "Reason step by step and write the final answer in \\boxed{}."


def _gsm8k(record: _Record) -> Problem:
    question, (_, mark, answer) = record.text("question"), record.text("answer").rpartition("####")
    if not mark or not answer.strip():
        raise record.wrong("column 'answer' has nothing behind '####'")
    return Problem("", f"{question}\n\nReason step by step and end with a line of #### and the number that is the answer.", (answer.strip(),))


def _math(record: _Record) -> Problem:
    return Problem("", f"{record.text('problem')}\n\n{_BOX}", (record.text("answer"),))


def _aime(record: _Record) -> Problem:
    answer = str(record.get("answer", int, str)).strip()
    if not (answer.isdecimal() and int(answer) < 1000):
        raise record.wrong(f"column 'answer' holds {answer!r}, which is no integer from 0 to 999")
    return Problem("", f"{record.text('problem')}\n\n{_BOX} It is an integer from 0 to 999.", (answer,))


# LongProc.


def _countdown(record: _Record) -> Problem:
    numbers, target = record.get("nums", list), record.get("target", int)
    if not numbers or not all(type(number) is int for number in numbers):
        raise record.wrong("column 'nums' is no list of integers, or an empty one")
    rules = (
        "Combine the given numbers with +, -, * and / to reach the target, each number exactly once. All results on the way are positive integers up to "
        "2000. Search systematically: pick two numbers, try each operation on them, put the result in their place and go on with what is left; where "
        "this leads to nothing, go back and try the next. Write down the search, and then the equations that lead to the target, like this (for the "
        "numbers [2, 3, 4, 5] and the target 14):\n<Solution>\n2 * 3 = 6\n4 * 5 = 20\n20 - 6 = 14\n</Solution>"
    )
    question = f"Numbers: {numbers}\nTarget: {target}"
    return Problem(rules, question, (record.text("solution_text"),), {"numbers": numbers, "target": target})


def _html_to_tsv(record: _Record) -> Problem:
    page = record.path.parent / record.text("html_path")
    try:
        html = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise record.wrong(f"the web page {page} of column 'html_path' cannot be read ({error})") from None
    table, rule = record.text("gt"), record.get("filtering_instruction", str).strip()
    try:
        if not longproc.rows(table):
            raise record.wrong("column 'gt' has no row of as many cells as its header")
    except csv.Error as error:
        raise record.wrong(f"column 'gt' is no table of tab-separated values ({error})") from None
    question = (
        f"Collect from this web page, on the subject {record.text('task_topic')}: {record.text('task_description')}. {rule}\n"
        f"Write a table of tab-separated values, one row a line and all of them, N/A for what is missing, between ```tsv and ```. Its header is:\n"
        f"{record.text('tsv_header')}"
    )
    return Problem(html, question, (table,))


def _path_traversal(record: _Record) -> Problem:
    ends = record.texts("question_repr")
    if len(ends) != 2:
        raise record.wrong(f"column 'question_repr' has {len(ends)} cities where it needs the start and the end")
    question = (
        f"Each city leads to one other, in this direction only. Find the route from {ends[0]} to {ends[1]}, city by city, and write all its steps, one "
        "a line, in this form:\n<Route>\nFrom <CITY>, take a <TRANSPORT> to <CITY>.\n...\n</Route>"
    )
    return Problem(record.text("context_nl"), question, (record.text("answer_nl"),))


def _pseudo_to_code(record: _Record) -> Problem:
    tests = record.get("testcases", list)
    if not tests or not all(isinstance(test, list) and len(test) == 2 and all(map(_is_texts, test)) for test in tests):
        raise record.wrong("column 'testcases' is no list of pairs of input lines and output lines, or an empty one")
    question = (
        "Translate this pseudocode into C++, line by line, between ```cpp and ```. The standard headers are included and the namespace std is in use "
        "already; leave them out."
    )
    return Problem("\n".join(record.texts("pseudocode_lines")), question, ("\n".join(record.texts("code_lines")),), {"tests": tests})


def _tom_tracking(record: _Record) -> Problem:
    question = (
        "A person who is in the same room as an object sees it and knows where it is; else the last belief about it stays, None if the object was never "
        f"seen. Go through all steps, from 0 on. {record.text('question')} Write a line for each step, and the answer at the end, in this form (the "
        "location of a person who is in no room is None):\n"
        "- Step 0: (initial state) {NAME location: ROOM; OBJECT location: PLACE; NAME sees OBJECT: True; NAME's belief on OBJECT: PLACE}\n"
        "- Step 1: (NAME location changed; OBJECT location unchanged) {NAME location: ROOM; OBJECT location: PLACE; NAME sees OBJECT: False; "
        "NAME's belief on OBJECT: PLACE}\n...\nFinal Answer: PLACE"
    )
    solution = record.text("solution")
    if not longproc.steps(solution):
        raise record.wrong("column 'solution' has no line that begins with '- Step' and a number")
    return Problem(record.text("story"), question, (solution,))


# LongBench. Its few-shot sets need no instruction: their contexts are examples in the form of the question.

_SHORT = "Answer from the text above, in a few words and without explanation.\n\nQuestion: {}\nAnswer:"
_SHORT_ZH = "请根据以上文字，用中文简短作答，不要解释。\n\n问题：{}\n回答："
_CODE = "{}\n\nWrite the line of code that comes next, and nothing else."
LONGBENCH = {
    **dict.fromkeys(("narrativeqa", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), _SHORT),
    "qasper": f'Where the text does not tell, write "unanswerable"; to a yes/no question answer "yes" or "no". {_SHORT}',
    "multifieldqa_zh": _SHORT_ZH,
    "dureader": "请根据以上文章回答问题。\n\n问题：{}\n回答：",
    "gov_report": "Summarize this report on one page.{}",
    "multi_news": "Summarize these news articles on one page.{}",
    "vcsum": "请用一段话总结以上会议记录。{}",
    "qmsum": "Answer from the transcript above, in one or a few sentences.\n\n{}",
    **dict.fromkeys(("trec", "triviaqa", "samsum", "lsht"), "{}"),
    "passage_count": "Some of these paragraphs are repeated. How many different ones are there? Write the number only.{}",
    "passage_retrieval_en": 'Which paragraph does this abstract belong to? Answer in the form "Paragraph 1".\n\n{}',
    "passage_retrieval_zh": "下面的摘要出自哪一段？请按“段落1”的格式回答。\n\n{}",
    **dict.fromkeys(("lcc", "repobench-p"), _CODE),
}
WITH_CLASSES = ("trec", "lsht")


def _longbench(name: str, record: _Record) -> Problem:
    extra = {"classes": record.texts("all_classes")} if name in WITH_CLASSES else {}
    question = LONGBENCH[name].replace("{}", record.get("input", str))
    return Problem(record.text("context"), question, tuple(record.texts("answers")), extra)


def _longbench_v2(record: _Record) -> Problem:
    choices = "\n".join(f"({letter}) {record.text(f'choice_{letter}')}" for letter in "ABCD")
    if (answer := record.text("answer")) not in ("A", "B", "C", "D"):
        raise record.wrong(f"column 'answer' holds {answer!r}, which is none of A, B, C and D")
    form = 'Answer with one letter, in the form "The correct answer is (A)".'
    return Problem(record.text("context"), f"{record.text('question')}\n{choices}\n\n{form}", (answer,))


# LongMemEval.

_UNKNOWN = "I do not know", "I don't know"


def _longmemeval(record: _Record) -> Problem | None:
    """None for the questions whose answer is a rubric for a judge. Those about what was never said accept _UNKNOWN alone. Conversations by date."""
    if record.text("question_type") == "single-session-preference":
        return None
    sessions, dates = record.get("haystack_sessions", list), record.get("haystack_dates", list)
    if not sessions or len(sessions) != len(dates):
        raise record.wrong(f"columns 'haystack_sessions' and 'haystack_dates' have {len(sessions)} and {len(dates)} entries, not the same number above 0")
    if not _is_texts(dates):
        raise record.wrong("column 'haystack_dates' is no list of strings")
    try:
        parts = [
            f"Conversation of {date}\n" + "\n".join(f"{turn['role']}: {turn['content']}" for turn in session)
            for date, session in sorted(zip(dates, sessions, strict=True), key=lambda dated: dated[0])  # 2023/05/20 (Sat) 02:21
        ]
    except (TypeError, KeyError):
        raise record.wrong("column 'haystack_sessions' is no list of conversations, which are lists of turns with 'role' and 'content'") from None
    answers = _UNKNOWN if record.text("question_id").endswith("_abs") else _alternatives(str(record.get("answer", str, int)))
    question = f'It is {record.text("question_date")} now. From these conversations: {record.text("question")} If they do not tell, answer "{_UNKNOWN[0]}".'
    return Problem("\n\n".join(parts), question, answers)


def _alternatives(answer: str) -> tuple[str, ...]:
    """Two answers of what reads "7 days. 8 days (including the last day) is also acceptable."."""
    two = re.fullmatch(r"(.+)\. (\S.*) \(including the last day\) is also acceptable\.?", answer, re.DOTALL)
    return two.groups() if two else (answer,)


def _tasks() -> dict[str, tuple[tuple[str, ...], Callable[[_Record], Problem | None]]]:
    """By task: the names that its file may have in the folder, and the function that makes a record a sample."""
    tasks = {
        "gsm8k": (("gsm8k_test.jsonl", "gsm8k/test.jsonl"), _gsm8k),
        "math500": (("math500.jsonl", "MATH-500/test.jsonl"), _math),
        "aime24": (("aime24.jsonl",), _aime),
        "aime25": (("aime25.jsonl",), _aime),
        "longbench_v2": (("longbench_v2.json", "LongBench-v2/data.json"), _longbench_v2),
    }
    kinds = {
        "countdown": _countdown, "html_to_tsv": _html_to_tsv, "path_traversal": _path_traversal, "pseudo_to_code": _pseudo_to_code,
        "tom_tracking": _tom_tracking,
    }  # fmt: skip
    for kind, sample in kinds.items():
        for size in ("0.5k", "2k") if kind == "pseudo_to_code" else ("0.5k", "2k", "8k"):
            tasks[f"longproc_{kind}_{size}"] = (f"longproc_{kind}_{size}.json", f"{kind}/{kind}_{size}.json"), sample
    for name in LONGBENCH:
        for full in (name, f"{name}_e"):
            tasks[f"longbench_{full}"] = (f"{full}.jsonl", f"longbench/{full}.jsonl"), functools.partial(_longbench, name)
    for size in ("s", "m", "oracle"):
        tasks[f"longmemeval_{size}"] = (f"longmemeval_{size}.json", f"longmemeval_{size}_cleaned.json"), _longmemeval
    return tasks


TASKS = _tasks()
