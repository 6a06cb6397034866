"""The benchmarks' metrics, each from 0 to 1, and `score`, which applies the one of a task.

LongBench (Bai et al. 2023, arXiv 2308.14508): per data set F1, ROUGE-L, accuracy or edit similarity, the best over the accepted answers.
LongBench v2 (Bai et al. 2024, arXiv 2412.15204): the letter of the choice. LongProc: see longproc.py. GSM8K, MATH-500, AIME: see math_answers.py.
LongMemEval (Wu et al. 2024, arXiv 2410.10813) is judged by a language model, which we do not have; `contains` stands in for it.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence

from retention.evaluation import longproc, math_answers
from retention.evaluation.datasets import Problem


def score(task: str, problem: Problem, generated: str, execute: bool = False) -> dict[str, float]:
    """What the benchmark of `task`, one of datasets.TASKS, measures of an answer to `problem`; first what it reports.

    `execute` lets longproc.pseudo_to_code run the programs that it checks. Raises KeyError for an unknown task, and what the metrics raise.
    """
    benchmark, _, name = task.partition("_")
    if benchmark == "longproc":
        return _longproc(name.rpartition("_")[0], problem, generated, execute)
    if task == "longbench_v2":
        return {"accuracy": float(choice(generated) == problem.answers[0])}
    if benchmark == "longbench":
        return _longbench(name.removesuffix("_e"), problem, generated)
    if benchmark == "longmemeval":
        return {"contains": float(any(contains(generated, answer) for answer in problem.answers))}
    return {"accuracy": float(math_answers.correct(task, generated, problem.answers[0]))}


def _longproc(name: str, problem: Problem, generated: str, execute: bool) -> dict[str, float]:
    if name == "countdown":
        return longproc.countdown(generated, problem.extra["numbers"], problem.extra["target"])
    if name == "pseudo_to_code":
        return longproc.pseudo_to_code(generated, problem.extra["tests"], execute)
    check = {"path_traversal": longproc.path_traversal, "tom_tracking": longproc.tom_tracking, "html_to_tsv": longproc.html_to_tsv}[name]
    return check(generated, problem.answers[0])


def _longbench(name: str, problem: Problem, generated: str) -> dict[str, float]:
    metric = LONGBENCH[name]
    if name in FEW_SHOT:
        generated = generated.lstrip("\n").split("\n")[0]
    if metric is classification:
        return {metric.__name__: max(classification(generated, answer, problem.extra["classes"]) for answer in problem.answers)}
    return {metric.__name__: max(metric(generated, answer) for answer in problem.answers)}


def qa_f1(generated: str, answer: str) -> float:
    """F1 of the words in common, each as often as in both, without case, punctuation and English articles."""
    return _f1(_words(generated), _words(answer))


def qa_f1_zh(generated: str, answer: str) -> float:
    """As `qa_f1` for Chinese, words being those that jieba finds. Raises ImportError where it is missing."""
    return _f1(*([word for word in map(_plain_zh, _segments(text)) if word] for text in (generated, answer)))


def rouge_l(generated: str, answer: str) -> float:
    """ROUGE-L over sentences, as the package `rouge` (1.0.1), which LongBench uses, computes it; case and punctuation count.

    Of every sentence of one text and every one of the other, the words of a longest common subsequence are taken; F1 is that of the different
    words among them all to the different words of either text. A full stop, wherever it is, ends a sentence.
    """
    # The package counts a blank between two full stops as one empty word.
    given, wanted = ([sentence.split() or [""] for sentence in text.split(".") if sentence] for text in (generated, answer))
    common = {word for one in wanted for other in given for word in _common_subsequence(one, other)}
    if not common:
        return 0.0
    precision, recall = (len(common) / len({word for sentence in text for word in sentence}) for text in (given, wanted))
    return 2 * precision * recall / (precision + recall)


def rouge_l_zh(generated: str, answer: str) -> float:
    """As `rouge_l` for Chinese, words being those that jieba finds. Raises ImportError where it is missing."""
    return rouge_l(" ".join(_segments(generated)), " ".join(_segments(answer)))


def classification(generated: str, answer: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that `generated` names, where `answer` is one of them; a class whose name is part of the answer's is not counted."""
    named = [name for name in classes if name in generated and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def number(generated: str, answer: str) -> float:
    """The part of the numbers in `generated` that are the first one in `answer`, as in "Paragraph 12"."""
    found, wanted = re.findall(r"\d+", generated), re.search(r"\d+", answer)
    return found.count(wanted[0]) / len(found) if found and wanted else 0.0


def edit_similarity(generated: str, answer: str) -> float:
    """difflib's similarity, in hundredths, of the first line of code in `generated`, one without backquotes and comments, to `answer`."""
    lines = (line for line in generated.lstrip("\n").split("\n") if not re.search("`|#|//", line))
    line = next(lines, "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100 if line and answer else 0.0


def choice(generated: str) -> str:
    """The letter in the first "The correct answer is (X)", or else "... is X", asterisks left out; empty where there is none."""
    plain = generated.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", plain) or re.search(r"The correct answer is ([A-D])", plain)
    return found[1] if found else ""


def contains(generated: str, answer: str) -> bool:
    """Whether `generated` holds the words of `answer` in one piece, without case, punctuation (a curly apostrophe is one) and articles.

    This is not LongMemEval's metric, and figures of the two cannot be compared: its judge also takes paraphrases, and numbers of days off by one.
    """
    wanted, given = (" ".join(_words(text.replace("’", "'"))) for text in (answer, generated))
    return f" {wanted} " in f" {given} "


FEW_SHOT = ("trec", "triviaqa", "samsum", "lsht")  # a model may go on with examples of its own: only the first line is the answer
LONGBENCH = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), qa_f1),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_l),
    **dict.fromkeys(("dureader", "vcsum"), rouge_l_zh),
    **dict.fromkeys(("trec", "lsht"), classification),
    **dict.fromkeys(("passage_retrieval_en", "passage_retrieval_zh", "passage_count"), number),
    **dict.fromkeys(("lcc", "repobench-p"), edit_similarity),
    "multifieldqa_zh": qa_f1_zh,
}


_WIDE = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
_SIGNS_ZH = str.maketrans("", "", string.punctuation + _WIDE)


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(?:a|an|the)\b", " ", plain).split()


def _plain_zh(word: str) -> str:
    """Without case, white space and the signs that LongBench leaves out, which are not all: an opening 《 stays."""
    return "".join(word.lower().translate(_SIGNS_ZH).split())


def _segments(text: str) -> list[str]:
    try:
        import jieba
    except ImportError:
        raise ImportError("LongBench's Chinese data sets are scored in the words that jieba finds; install it with `pip install jieba`") from None
    return list(jieba.cut(text))


def _f1(given: list[str], wanted: list[str]) -> float:
    return 2 * sum((Counter(given) & Counter(wanted)).values()) / (len(given) + len(wanted)) if given and wanted else 0.0


def _common_subsequence(first: list[str], second: list[str]) -> list[str]:
    """A longest one; of several, the one found by going back from the ends, in `second` first unless `first` promises more."""
    lengths = [[0] * (len(second) + 1)]
    for word in first:
        above, row = lengths[-1], [0]
        for at, other in enumerate(second):
            row.append(above[at] + 1 if word == other else max(above[at + 1], row[at]))
        lengths.append(row)
    found, i, j = [], len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            found.append(first[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
