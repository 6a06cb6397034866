"""Metrics against values worked out by hand."""

import shutil
import sys
import time
import types

import pytest

from retention.evaluation import datasets, longproc, metrics
from retention.evaluation.datasets import Problem


@pytest.mark.parametrize(
    "generated, answer, expected",
    [
        ("The Cat, sat!", "a cat sat", 1),
        ("cat cat dog", "cat", 1 / 2),  # 1 in common of 3 and 1
        ("cat cat dog", "cat cat", 4 / 5),
        ("", "cat", 0),
        ("the", "the", 0),  # nothing is left to compare
    ],
)
def test_qa_f1(generated, answer, expected):
    assert metrics.qa_f1(generated, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    "generated, answer, expected",
    [
        ("a b c d", "a b c d", 1),
        ("a c b d", "a b c d", 3 / 4),
        ("a b. c d", "c d. a b", 1),  # sentence by sentence
        ("a a a b", "a b", 1),  # different words only
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 2 * 4 / (8 + 5)),  # the union of w1 w2 and w1 w3 w5
        ("A", "a", 0),
        ("", "a", 0),
        ("a . . b", "a . . b", 1),
    ],
)
def test_rouge_l(generated, answer, expected):
    assert metrics.rouge_l(generated, answer) == pytest.approx(expected)


def test_chinese_words_come_from_jieba(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", types.SimpleNamespace(cut=lambda text: iter(text.split("|"))))
    assert metrics.qa_f1_zh("北京|，|很大", "北京|。") == pytest.approx(2 / 3)
    # The release leaves out 》 and not 《, nor ℃: with the package jieba and its own function these are 2/3, 1/2 and 4/5.
    assert metrics.qa_f1_zh("红楼梦", "《|红楼梦|》") == pytest.approx(2 / 3)
    assert metrics.qa_f1_zh("《|西游记|》", "《|红楼梦|》") == pytest.approx(1 / 2)
    assert metrics.qa_f1_zh("25|℃", "25|℃|左右") == pytest.approx(4 / 5)
    assert metrics.rouge_l_zh("北京|很|大", "北京|大") == pytest.approx(4 / 5)
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ImportError, match="pip install jieba"):
        metrics.qa_f1_zh("北京", "北京")


def test_classification():
    classes = ["Number", "Date", "Expression abbreviated", "Expression"]
    assert metrics.classification("It is a Date.", "Date", classes) == 1
    assert metrics.classification("Date or Number", "Date", classes) == 1 / 2
    assert metrics.classification("Expression abbreviated", "Expression abbreviated", classes) == 1
    assert metrics.classification("Number", "Date", classes) == metrics.classification("", "Date", classes) == 0


def test_numbers_code_and_choices():
    assert metrics.number("Paragraph 12 or 13", "Paragraph 12") == 1 / 2
    assert metrics.number("段落12", "段落12") == 1 and metrics.number("none", "3") == 0 and metrics.number("112", "12") == 0
    assert metrics.edit_similarity("```python\n# a comment\nreturn x\nreturn y", "return x") == 1
    assert metrics.edit_similarity("abcd", "abxx") == 0.5 and metrics.edit_similarity("# only", "x") == 0
    assert metrics.choice("**The correct answer is (B)**, not (C)") == "B" and metrics.choice("The correct answer is D.") == "D"
    assert metrics.choice("B") == ""
    assert metrics.contains("You own the red car.", "a red  car") and not metrics.contains("You own a red cart", "red car")
    assert metrics.contains("I don’t know.", "I don't know") and not metrics.contains("I do know.", "I don't know")
    assert metrics.qa_f1("I don’t know", "I don't know") == pytest.approx(2 / 3), "as published: there a curly apostrophe is a letter"


def test_countdown():
    def accuracy(*lines, numbers=(21, 16, 17, 26), target=46):
        return longproc.countdown("I search.\n<Solution>\n" + "\n".join(lines) + "\n</Solution>", list(numbers), target)["accuracy"]

    assert accuracy("21 + 16 = 37", "37 - 17 = 20", "26 + 20 = 46") == 1
    assert accuracy("21 + 16 = 37", "37 - 17 = 20", "26 + 20 = 47") == 0  # wrong sum
    assert accuracy("21 + 16 = 37", "37 - 17 = 20", "20 + 20 = 40", target=40) == 0  # 20 is there once
    assert accuracy("21 + 16 = 37", "37 - 17 = 20") == 0  # 26 is left over
    assert accuracy("21 + 16 = 37", "37 - 17 = 20", "26 + 20 = 46", target=45) == 0
    assert accuracy("8 / 2 = 4", "4 * 3 = 12", numbers=(2, 8, 3), target=12) == 1
    assert accuracy("9 / 2 = 4", numbers=(9, 2), target=4) == 0 and accuracy("0 / 0 = 4", numbers=(0, 0), target=4) == 0
    assert accuracy("3 - 5 = -2", "-2 + 4 = 2", "2 + 10 = 12", numbers=(3, 4, 5, 10), target=12) == 1  # the release lets it pass
    assert accuracy("3 - -5 = 8", numbers=(3, 5), target=8) == 0
    assert accuracy("__import__('os') + 1 = 2") == 0
    assert longproc.countdown("21 + 16 = 37\n37 - 17 = 20\n26 + 20 = 46", [21, 16, 17, 26], 46) == {"accuracy": 0}
    twice = "<Solution>\n1 + 2 = 4\n</Solution> no: <Solution>\n1 + 2 = 3\n</Solution>"
    assert longproc.countdown(twice, [1, 2], 3) == {"accuracy": 1}


def test_path_traversal():
    route = "From A, take a bus to B.\nFrom B, take a train to C."
    assert longproc.path_traversal(f"<Route>\n{route}\n</Route>", route) == {"accuracy": 1, "partial_accuracy": 1}
    wrong = route.replace("train", "bus")
    assert longproc.path_traversal(f"<Route>\n{wrong}\n</Route>", route) == {"accuracy": 0, "partial_accuracy": 1 / 2}
    assert longproc.path_traversal(route, route) == {"accuracy": 0, "partial_accuracy": 0}
    longer = f"<Route>\n{route}\nFrom C, take a bus to D.\n</Route>"
    assert longproc.path_traversal(longer, route) == {"accuracy": 0, "partial_accuracy": 1}


def test_tom_tracking():
    trace = "Ann's belief on the cup:\n- Step 0: (initial state) {Ann location: attic}\n- Step 1: {Ann location: None}\nFinal Answer: the attic"
    said = "- Step 0: no wait\n\n- Step 0: (Initial state) {Ann: the attic}\n- Step 1: {Ann location: None}"
    assert longproc.tom_tracking(said, trace) == {"accuracy": 1, "partial_accuracy": 1}
    assert longproc.tom_tracking(said.replace("None", "attic"), trace) == {"accuracy": 0, "partial_accuracy": 1 / 2}
    assert longproc.tom_tracking("the attic", trace) == {"accuracy": 0, "partial_accuracy": 0}


def test_html_to_tsv():
    table = "name\tprice\nThe Lamp\t$5\nChair\t7\nDesk\t9"

    def row_scores(generated):
        return tuple(longproc.html_to_tsv(generated, table).values())

    assert row_scores(f"Here it is:\n```tsv\n{table}\n```\nThat is all.") == row_scores(table) == (1, 1, 1)
    assert row_scores(f"```tsv\n{table}\nand so on") == (1, 1, 1)  # cut off, and a closing remark
    assert row_scores("name\tprice\nchair\t7\nlamp\t5") == (pytest.approx(4 / 5), 1, 2 / 3)
    assert row_scores("name\tprice\nChair\t7\nDesk\t8") == (pytest.approx(2 / 5), 1 / 2, 1 / 3)
    draft = "<think>\n```tsv\nname\tprice\nSofa\t1\n```\n</think>\n"
    assert row_scores(f"{draft}```tsv\n{table}\n```")[1] < 1, "from the first fence to the last, as the release reads it"
    assert row_scores("name\tprice\nchair\t7\nchair\t7") == (pytest.approx(1 / 2), 1, 1 / 3), "a row given twice is found once"
    assert row_scores("") == row_scores("name\tprice") == row_scores("name\tprice\n\0\t\0") == (0, 0, 0)


CODE = "```cpp\nint main() { int x; cin >> x; cout << 2 * x << endl; }\n```"
TESTS = [[["3"], ["6"]], [["-1"], ["-2"]]]


def test_programs_are_not_run_unasked():
    with pytest.raises(ValueError, match="outside any sandbox; pass execute=True"):
        longproc.pseudo_to_code(CODE, TESTS)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_programs():
    assert longproc.pseudo_to_code(CODE, TESTS, execute=True) == {"accuracy": 1}
    assert longproc.pseudo_to_code(CODE, [TESTS[0], [["-1"], ["7"]]], execute=True) == {"accuracy": 0}, "every test counts"
    assert longproc.pseudo_to_code(CODE.replace("2 *", "3 *"), TESTS, execute=True) == {"accuracy": 0}
    assert longproc.pseudo_to_code(CODE.replace("int x;", ""), TESTS, execute=True) == {"accuracy": 0}
    assert longproc.pseudo_to_code('```cpp\nint main() { while (1) puts("6"); }\n```', TESTS, execute=True) == {"accuracy": 0}
    assert longproc.pseudo_to_code("int main() {}", TESTS, execute=True) == {"accuracy": 0}


@pytest.mark.skipif(not shutil.which("sh"), reason="no shell")
def test_a_program_has_limits_and_nothing_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hidden")
    limits = longproc._run(["sh", "-c", "ulimit -t; ulimit -v; ulimit -f; echo $SECRET; pwd"], "", str(tmp_path), 3)
    assert limits.split() == ["3", "1048576", "65536", str(tmp_path)]
    assert longproc._run(["sh", "-c", "while :; do :; done"], "", str(tmp_path), 1) is None
    assert longproc._run(["sh", "-c", "(sleep 1; touch later) & echo now"], "", str(tmp_path), 3) == "now\n"
    time.sleep(1.5)
    assert not list(tmp_path.iterdir()), "what it starts ends with it"
    assert longproc._run(["sh", "-c", "rmdir $PWD; echo gone"], "", str(tmp_path), 3) == "gone\n"
    assert longproc._run(["echo", "there"], "", str(tmp_path), 3) is None


def test_a_compiler_that_compiles_nothing_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(longproc.shutil, "which", lambda program: program)
    monkeypatch.setattr(longproc, "COMPILE", ["false"])
    with pytest.raises(OSError, match="cannot compile even an empty program in .*; see to it that the disk is not full"):
        longproc.pseudo_to_code(CODE, TESTS, execute=True)


def test_programs_need_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"g\+\+"):
        longproc.pseudo_to_code(CODE, TESTS, execute=True)


def test_score():
    def score(task, generated, *answers, **extra):
        return metrics.score(task, Problem("", "", answers, extra), generated)

    assert score("gsm8k", "#### 18", "18") == {"accuracy": 1}
    assert score("aime25", r"\boxed{18}", "19") == {"accuracy": 0}
    assert score("longproc_countdown_0.5k", "<Solution>\n1 + 2 = 3\n</Solution>", "", numbers=[1, 2], target=3) == {"accuracy": 1}
    assert score("longproc_path_traversal_8k", "<Route>x</Route>", "x")["accuracy"] == 1
    assert list(score("longproc_html_to_tsv_2k", "a\nb", "a\nb")) == ["f1", "precision", "recall"]
    assert score("longbench_hotpotqa", "cat", "dog", "cat") == {"qa_f1": 1}
    assert score("longbench_triviaqa_e", "\ncat\nPassage: another", "cat") == {"qa_f1": 1}
    assert score("longbench_hotpotqa", "cat\nanother", "cat")["qa_f1"] == pytest.approx(2 / 3)
    assert score("longbench_trec", "Date\nNumber", "Date", classes=["Date", "Number"]) == {"classification": 1}
    assert score("longbench_v2", "The correct answer is (C).", "C") == {"accuracy": 1}
    assert score("longmemeval_s", "It was Rome", "Rome") == {"contains": 1}
    with pytest.raises(ValueError, match="execute"):
        score("longproc_pseudo_to_code_2k", CODE, "", tests=TESTS)


def test_longbench_is_measured_as_published():
    """dataset2metric of its eval.py (THUDM/LongBench at 072a5a7), where retrieval and count are our `number`; four sets are cut after the first line."""
    published = {
        "narrativeqa": "qa_f1", "qasper": "qa_f1", "multifieldqa_en": "qa_f1", "multifieldqa_zh": "qa_f1_zh", "hotpotqa": "qa_f1", "2wikimqa": "qa_f1",
        "musique": "qa_f1", "dureader": "rouge_l_zh", "gov_report": "rouge_l", "qmsum": "rouge_l", "multi_news": "rouge_l", "vcsum": "rouge_l_zh",
        "trec": "classification", "triviaqa": "qa_f1", "samsum": "rouge_l", "lsht": "classification", "passage_retrieval_en": "number",
        "passage_count": "number", "passage_retrieval_zh": "number", "lcc": "edit_similarity", "repobench-p": "edit_similarity",
    }  # fmt: skip
    assert {name: metric.__name__ for name, metric in metrics.LONGBENCH.items()} == published
    assert set(metrics.FEW_SHOT) == {"trec", "triviaqa", "samsum", "lsht"}


def test_every_data_set_of_longbench_has_a_metric():
    assert metrics.LONGBENCH.keys() == datasets.LONGBENCH.keys() and set(metrics.FEW_SHOT) < metrics.LONGBENCH.keys()
    with_classes = {name for name, metric in metrics.LONGBENCH.items() if metric is metrics.classification}
    assert with_classes == set(datasets.WITH_CLASSES)
