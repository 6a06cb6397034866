"""One door to all tasks: samples to read and questions to ask, and the score of an answer."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retention.chat import ASK, SYSTEM, USER
from retention.evaluation import datasets, metrics, needles, ruler
from retention.names import check_name
from retention.training import text

NAMES = (*needles.TASKS, *ruler.TASKS, "prose", *datasets.TASKS)
QA_FILES = {"qa_1": ("squad.json", "dev-v2.0.json", "dev-v1.1.json"), "qa_2": ("hotpotqa.json", "hotpot_dev_distractor_v1.json")}


@dataclass(frozen=True)
class Task:
    """What is read, asked and wanted, sample by sample. problems: those of a benchmark that the samples were made from. execute: see metrics.score."""

    name: str
    samples: Sequence[needles.Sample]
    problems: Sequence[datasets.Problem] = ()
    execute: bool = False

    def score(self, sample: int, question: int, generated: str) -> dict[str, float]:
        """What the task measures of an answer, each from 0 to 1: "score", and what its benchmark reports besides."""
        answer = self.samples[sample].answers[question]
        if self.name in needles.TASKS:
            return {"score": float(needles.correct(self.name, answer, generated))}
        if self.name in ruler.TASKS:
            return {"score": ruler.score(self.name, answer, generated)}
        first, *others = metrics.score(self.name, self.problems[sample], generated, self.execute).items()
        return {"score": float(first[1]), **{name: float(value) for name, value in others}}

    def longest_answer(self, encode: text.Encode) -> int:
        """Tokens of the longest answer of full score where answers are strings to be found, several as a numbered list; 0 for the benchmarks."""

        def tokens(answer: str | Sequence[str]) -> int:
            strings = (answer,) if isinstance(answer, str) else answer
            if self.name in ruler.QA:  # any of them will do
                return min(len(encode(one)) for one in strings)
            whole = strings[0] if len(strings) == 1 else "".join(f"\n{i}. {one}" for i, one in enumerate(strings, 1))
            return len(encode(whole))

        return 0 if self.problems else max(tokens(answer) for sample in self.samples for answer in sample.answers)


def check(name: str) -> None:
    """Raises ValueError, with the nearest names, for a task that is not known."""
    check_name("task", name, NAMES)


def has_length(name: str) -> bool:
    """Whether the task is made at any length; the others are as long as their files have them."""
    return name not in datasets.TASKS


def load(
    name: str, encode: text.Encode, texts: list[str], length: int | None, count: int, seed: int, data: str | None = None, execute: bool = False
) -> Task:
    """`count` samples of a task, of `length` tokens where it has a choice; of a benchmark's problems those that `seed` picks, in the file's order.

    texts: haystacks. data: the folder of the benchmarks' files and of those that qa_1 and qa_2 ask from. Raises as the tasks' modules do, and
    ValueError where a task needs data and there is none, or a file holds fewer than `count`. A metric that cannot run here raises now.
    """
    check(name)
    if name in needles.TASKS:
        return Task(name, needles.samples(name, encode, texts, length, count, seed))
    if data is None and (name in ruler.QA or name in datasets.TASKS):
        raise ValueError(f"{name} is read from a file: give the folder that holds it as config.data")
    if name in ruler.TASKS:
        return Task(name, ruler.samples(name, encode, texts, length, count, seed, datasets.find(name, QA_FILES[name], data) if name in ruler.QA else None))
    problems = datasets.load(name, data)
    if len(problems) < count:
        raise ValueError(f"{name} has {len(problems)} problems and config.samples asks for {count}; ask for no more")
    problems = [problems[i] for i in sorted(np.random.default_rng(seed).permutation(len(problems))[:count])]
    task = Task(name, [_asked(problem) for problem in problems], problems, execute)
    task.score(0, 0, r"\boxed{\pi}")  # what no comparison of strings settles: the metric may need a package, a compiler, or leave to run programs
    return task


def seen(task: Task) -> Task:
    """The same with question i mod Q of sample i in its context, so that what compresses the context knows it. Raises ValueError for tasks of turns."""
    if any(sample.turns for sample in task.samples):
        raise ValueError(f"question_seen makes no sense for {task.name}, whose questions are turns; evaluate it without")
    joined = []
    for i, one in enumerate(task.samples):
        asked = i % len(one.questions)
        joined.append(dataclasses.replace(one, context=one.context + one.questions[asked], questions=("",), answers=(one.answers[asked],)))
    return dataclasses.replace(task, samples=joined)


def _asked(problem: datasets.Problem) -> needles.Sample:
    """Where there is no context the question follows the turn's opening directly."""
    space = "\n\n" if problem.context else ""
    context, question = text.without_marks(problem.context), text.without_marks(problem.question)
    return needles.Sample(SYSTEM + USER + context, (space + question + ASK,), (problem.answers,))
