"""One door to all tasks: samples to read and questions to ask, and the score of an answer."""

import dataclasses
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

from retention.evaluation import datasets, metrics, needles, ruler
from retention.names import check_name
from retention.training import text
from retention.training.documents import ASK, SYSTEM, USER

NAMES = (*needles.TASKS, *ruler.TASKS, "prose", *datasets.TASKS)


@dataclass(frozen=True)
class Task:
    """What is read, asked and wanted, sample by sample. Problems, where there are any, are what the samples were made from."""

    name: str
    samples: Sequence[needles.Sample]
    problems: Sequence[datasets.Problem] = ()

    def score(self, sample: int, question: int, generated: str) -> dict[str, float]:
        """What the task measures of an answer, each from 0 to 1: "score", and what its benchmark reports besides."""
        answer = self.samples[sample].answers[question]
        if self.name in needles.TASKS:
            return {"score": float(needles.correct(self.name, answer, generated))}
        if self.name in ruler.TASKS:
            return {"score": ruler.score(self.name, answer, generated)}
        first, *others = metrics.score(self.name, self.problems[sample], generated).items()
        return {"score": float(first[1]), **{name: float(value) for name, value in others}}


def check(name: str) -> None:
    """Raises ValueError, with the nearest names, for a task that is not known."""
    check_name("task", name, NAMES)


def has_length(name: str) -> bool:
    """Whether the task is made at any length; the others are as long as their files have them."""
    return name not in datasets.TASKS


def load(name: str, encode: text.Encode, texts: list[str], length: int | None, count: int, seed: int, data: str | None) -> Task:
    """The first `count` samples of a task, of `length` tokens where it has a choice.

    texts: haystacks. data: the folder of the benchmarks' files, or the file that ruler's qa_1 or qa_2 asks from. Raises as the tasks' modules do, and
    ValueError where a task needs data and there is none, or a file holds fewer than `count`.
    """
    check(name)
    if name in needles.TASKS:
        return Task(name, needles.samples(name, encode, texts, length, count, seed))
    if name in ruler.TASKS:
        return Task(name, ruler.samples(name, encode, texts, length, count, seed, pathlib.Path(data) if data else None))
    if data is None:
        raise ValueError(f"task {name} is read from a file: give its folder as config.data")
    problems = datasets.load(name, data)
    if len(problems) < count:
        raise ValueError(f"{name} has {len(problems)} problems and config.samples asks for {count}; ask for no more")
    return Task(name, [_asked(problem) for problem in problems[:count]], problems[:count])


def seen(task: Task) -> Task:
    """The same with each sample's first question in its context, so that what compresses the context knows it. Raises ValueError for tasks of turns."""
    if any(sample.turns for sample in task.samples):
        raise ValueError(f"question_seen makes no sense for {task.name}, whose questions are turns; evaluate it without")
    joined = [dataclasses.replace(one, context=one.context + one.questions[0], questions=("",), answers=one.answers[:1]) for one in task.samples]
    return dataclasses.replace(task, samples=joined)


def _asked(problem: datasets.Problem) -> needles.Sample:
    """Where there is no context the question follows the turn's opening directly."""
    space = "\n\n" if problem.context else ""
    return needles.Sample(SYSTEM + USER + problem.context, (space + problem.question + ASK,), (problem.answers,))
