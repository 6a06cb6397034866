"""Final answers of solutions: where they stand, and which ones say the same."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retention.evaluation import math_answers, symbolic
from retention.evaluation.math_answers import boxed, correct, equivalent, last_number

SAME = [
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac 59", "5/9"),
    (r"\frac{270}7\text{ degrees}", "270/7"),
    ("1/2", ".5"),
    (r"1\frac{4}{5}", "9/5"),
    ("1 4/5", "1.8"),
    (r"0.1\overline{6}", r"\frac16"),
    (r"6.72 \times 10^{-5}", ".0000672"),
    ("58,500", "58500"),
    (r"11,\! 111,\! 100", "11111100"),
    (r"\$32,\!348", "32348"),
    ("$18.90", "18.9"),
    (r"50\%", "50"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90°"),
    (r"864 \mbox{ inches}^2", "864 square inches"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{(C)}", "C"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    (r"(2,\infty)", r"\left(2, \infty\right)"),
    (r"\left(\frac35,\frac83\right]", "(0.6, 8/3]"),
    (r"x \in [-2,7]", "[-2, 7]"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)"),
    ("1,-2", r"x=-2 \text{ or } x=1"),
    ("100, 200", "200,100"),
    ("100,200", "100, 200"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2, 1+\sqrt5, 1-\sqrt5"),
    (r"x = \{1\pm\sqrt{5},-2\}", r"-2, 1+\sqrt5, 1-\sqrt5"),
    (r"x = 1 \pm 2", "-1, 3"),
    (r"\{5\}", "5"),
    (r"\begin{pmatrix} -1/3 \\ 2 \end{pmatrix}", r"\begin{bmatrix} -\frac13 \\ 2 \end{bmatrix}"),
    (r"\mathbf{v} = \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("x=5", "5"),
    ("f(x) = 2x+3", "3+2x"),
    ("y = 2x + 3", "4x - 2y + 6 = 0"),
    ("4210_{5}", "4210_5"),
    (r"\sqrt{12}", r"2\sqrt3"),
    (r"\frac{1}{\sqrt 3}", r"\frac{\sqrt{3}}{3}"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt2"),
    ("3√13", "sqrt(13)*3"),
    (r"\cot x", r"\frac{\cos x}{\sin x}"),
    (r"\sin^2 x + \cos^2 x", "1"),
    (r"\log_2 8", "3"),
    ("|-3|", "3"),
    ("5!", r"\binom{10}{3}"),
    ("(a+5)(b+2)", "ab + 2a + 5b + 10"),
    ("x^10", "x^{10}"),
    ("(1+i)^2", "2i"),
    (r"e^{i\pi}", "-1"),
    (r"2+3\mathrm{i}", "2+3i"),
    (r"3\mathrm{e}^2", "3e^2"),
    (r"2\mathbf{i} - 3\mathbf{j}", r"-3\mathbf{j} + 2\mathbf{i}"),
    (r"\operatorname{arctan} x", r"\arctan x"),
    (r"5\,\mathrm{cm}", "5"),
    (r"9.8 \text{ m/s}^2", r"9.8\,\mathrm{m}/\mathrm{s}^2"),
    (r"60 \text{ miles per hour}", "60 mph"),
    (r"\$5 \text{ per hour}", "5"),
    (r"6 \text{ sq. units}", "6 square units"),
    (r"\text{5 cm}", "5"),
    (r"12 \text{ ways}", "12"),
    (r"12 \text{ bags}", "12"),
    (r"6 \text{ years old}", "6"),
    (r"7 \text{ men}", "7"),
    (r"21 \text{ possible values}", "21"),
    (r"20\,\text{N}", "20"),
    (r"2\pi \text{ Joules}", r"2\pi"),
    (r"5x \text{ dollars}", "5x"),
    (r"\frac{1}{2}\mbox{ cm$^2$}", "1/2"),
    (r"5\,\mathrm{m}\,\mathrm{s}^{-1}", r"5 \text{ m/s}"),
    (r"6 \text{ ways to choose}", "6"),
    ("48 integers", "48"),
    ("60 miles per hour", "60"),
    (r"\(5\)", r"\[5\]"),
    (r"\(5\).", "5"),
    (r"x \gt 5", "x>5"),
    (r"x \lt 5", "x<5"),
    (r"x \neq 5", r"x\ne5"),
    (r"{1\over2}", "1/2"),
    (r"{\sqrt{3} \over 2}", r"\frac{\sqrt3}{2}"),
    (r"\left(\begin{array}{c}1\\2\end{array}\right)", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\vec{v}=\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"\lambda \in (1,2)", "(1,2)"),
    ("x>5", r"(5,\infty)"),
    ("5<x", "x>5"),
    (r"x \le 0", r"(-\infty,0]"),
    (r"-2\le x\le 7", r"x \in [-2,7]"),
    (r"7 \ge x > -2", "(-2,7]"),
    (r"-\sqrt3<x<\sqrt3", r"(-\sqrt{3},\sqrt{3})"),
    ("3,5,and 7", "3,5,7"),
    ("4343_{(6)}", "4343_6"),
    (r"\text{ellipse.}", r"\text{ellipse}"),
    (r"(r,\theta)=(3,\pi/2)", r"(3,\pi/2)"),
    ("x=1, y=2", "y = 2, x = 1"),
    ("1 000", "1000"),
    (r"2 \log_2 128", "14"),
    ("2^3^2", "512"),
    (r"\text{No}", "no"),
    ("ab", "ba"),
    ("2 abc", "2bca"),
    (r"x<-2 \text{ or } x>2", r"(-\infty,-2)\cup(2,\infty)"),
    (r"0<x<1 \cup x>2", r"(2,\infty)\cup(0,1)"),
    (r"x > 2 \text{ or } x<-2", r"x < -2 \text{ or } x > 2"),
    (r"\begin{pmatrix} \frac{1}{5} \\[4pt] -\frac{18}{5} \end{pmatrix}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}"),
    ("{58,500}", "58500"),
    ("{(3,4]}", "(3,4]"),
    (r"\displaystyle{\frac12}", "0.5"),
    (r"{{\text{east}}}", "east"),
    ("{1,-2}", "-2,1"),
    (r"\mathbf{\frac{3\sqrt{3}}{4}}", r"\frac{3}{4}\sqrt3"),
    (r"\boldsymbol{5}", "5"),
    (r"\left\lbrace 1, 2 \right\rbrace", r"\{2,1\}"),
    ("5 cm squared", "5"),
]
# A given answer may say more than the wanted one, not less.
MORE = [
    ("f(3)=5", "5"),
    ("2+3=5", "5"),
    ("a+b=5", "5"),
    ("|z|=5", "5"),
    (r"\overline{AB}=5 \text{ cm}", "5"),
    (r"x_{\max}=5", "5"),
    (r"P(X \ge 2)=5", "5"),
    ("f^{-1}(x)=2x", "2x"),
    (r"x=\frac{10}{2}=5", "5"),
    (r"x=\frac{10}{2}=5", "x=5"),
    (r"\text{(C) } 5", "C"),
    (r"\textbf{(C)}\ -5", r"\text{(C)}"),
    (r"(C)\ 5", r"\text{(C)}"),
    ("C. 5", "C"),
    ("C. point P", "C"),
    ("(C) triangle ABC", "C"),
    ("(r,s)=(2,1)", "(2,1)"),
    ("f(1)+f(2)=5", "5"),
    ("f(g(2))=0", "0"),
    ("a-b+c=5", "5"),
    (r"\frac{AB}{CD}=\frac12", "1/2"),
    (r"\text{Area of }\triangle ABC = 5", "5"),
    (r"3 \text{ cm} + 2 \text{ cm} = 5 \text{ cm}", "5"),
    (r"x^2+1 = 2^2+1 = 5", "5"),
    ("34_5 = 19", "19"),
    ("2-2=0", "0"),
    (r"5\sqrt{2} \approx 7.07", r"\sqrt{50}"),
    (r"x = \frac{243}{625} ≈ 0.389", r"\frac{243}{625}"),
    (r"\pi \approx 3.14", r"\pi"),
]
DIFFERENT = [
    ("", "5"),
    ("-5", "5"),
    ("0.333", r"\frac13"),
    ("52", "52_8"),
    ("52_8", "52_9"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2]", "(1,2)"),
    ("1,2", "(1,2)"),
    ("1,2", "1,2,3"),
    ("5,5", "5"),
    (r"(1,2)\cup(3,4)", "(1,2)"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}"),
    ("east", "seat"),
    (r"\text{(B)}", "(C)"),
    ("y=2x", "y=-2x"),
    ("x=5", "y=5"),
    ("x-1", "x+1"),
    (r"\sqrt{x^2}", "x"),
    ("1/0", "2/0"),
    (r"\infty", r"-\infty"),
    (r"\frac{}{}", "1"),
    (r"\sqrt{2", "1"),
    (r"\undefined{3}", "3"),
    (r"3\mathbf{j}", r"3\mathbf{k}"),
    (r"2\mathbf{i}-3\mathbf{j}", r"2\mathbf{i}-3\mathbf{k}"),
    (r"2\mathrm{i}", "2"),
    (r"3\mathrm{e}^2", "3"),
    (r"\frac13\mathrm{e}^2", "1/3"),
    (r"3\text{ or more}", "3"),
    (r"5\text{ million}", "5"),
    ("5 million", "5"),
    (r"5\text{ hundred dollars}", "5"),
    (r"3\text{ dollars or more}", "3"),
    (r"3\text{ and a half}", "3"),
    (r"3\text{ less than } x", "3"),
    (r"13\text{ base six}", "13"),
    (r"9\text{ a.m.}", r"9\text{ p.m.}"),
    (r"5\text{ feet 3 inches}", "5"),
    (r"2\text{i}", "2"),
    (r"\text{red and blue}", r"\text{red}"),
    (r"n \text{ even}", r"n \text{ odd}"),
    (r"x_\text{min}", "x_"),
    ("1 0", "10"),
    ("2 3", "23"),
    ("2 3", "6"),
    ("no", "on"),
    ("2^3^2", "64"),
    ("f(3)=5", "3"),
    ("x=5=6", "5"),
    ("(r,s)=(2,1)", "(1,2)"),
    ("5x - 7y + 4 = 0", "4"),
    ("x>5", "y>5"),
    (r"x \in [1,2]", r"y \in [1,2]"),
    ("x>5", r"[5,\infty)"),
    ("x>5", r"(-\infty,5)"),
    (r"-2\le x<7", "[-2,7]"),
    ("4343_{(6)}", "4343_5"),
    (r"\text{(B) } 5", "C"),
    (r"\text{(A) or (C)}", "A"),
    ("(A), (C)", "A"),
    ("C 5", "C"),
    ("A: 3, B: 4, C: 5", "A"),
    ("A. 5, B. 6", "A"),
    ("A) 5 B) 6 C) 7", "A"),
    ("(A) 5 and B", "A"),
    ("A. B", "A"),
    ("x^2+y^2=25", "25"),
    ("x+y=0", "0"),
    ("x+y-1=5", "5"),
    ("x^2 - 5x + 6 = 0", "0"),
    ("x^2 - 5x + 6 = (x-2)(x-3) = 0", "0"),
    ("2x=6", "6"),
    ("3x-1=5", "5"),
    (r"\frac{x}{3}=5", "5"),
    ("2^x=8", "8"),
    (r"x<-2 \text{ or } x>2", r"(-\infty,-2]\cup(2,\infty)"),
    ("(1,2),(3,4)", r"(1,2)\cup(3,4)"),
    ("3 halves", "3"),
    ("5 squared", "5"),
    (r"5\text{ factorial}", "5"),
    (r"2\text{ negative}", "2"),
    ("2 theta", "2"),
    ("{1}{2}", "12"),
    (r"5\sqrt{2} \approx 7.07", "7.07"),
    (r"x \approx 7.07", r"\pi"),
]


@pytest.mark.parametrize("one, other", SAME)
def test_the_same(one, other):
    assert equivalent(one, other) and equivalent(other, one) and equivalent(one, one)


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_different(one, other):
    assert not equivalent(one, other) and not equivalent(other, one)


@pytest.mark.parametrize("more, wanted", MORE)
def test_a_given_answer_may_say_more(more, wanted):
    assert equivalent(more, wanted)


@pytest.mark.parametrize("less, wanted", [("0", "5x - 7y + 4 = 0"), ("25", "x^2 + y^2 = 25"), ("5", "a+b=5")])
def test_a_part_of_an_equation_is_not_the_answer(less, wanted):
    assert not equivalent(less, wanted)


@given(st.integers(-999, 999), st.integers(1, 99))
@settings(deadline=None)
def test_spellings_of_a_fraction(over, under):
    value, sign = Fraction(over, under), "-" if over < 0 else ""
    whole, rest = divmod(abs(over), under)
    spellings = [f"{over}/{under}", rf"{sign}\frac{{{abs(over)}}}{{{under}}}", rf"\dfrac{{{2 * over}}}{{{2 * under}}}", rf"${over} \div {under}$", str(value)]
    spellings += [rf"{sign}{whole}\frac{{{rest}}}{{{under}}}"] if whole and rest else []
    for spelling in spellings:
        assert equivalent(spelling, str(value)), spelling
        assert not equivalent(spelling, str(value + Fraction(1, 9801))), spelling


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=3), st.integers(1, 9))
@settings(deadline=None, max_examples=25)
def test_expanded_products(roots, factor):
    coefficients = [factor]
    for root in roots:  # times (x - root)
        coefficients = [high - root * low for high, low in zip([*coefficients, 0], [0, *coefficients], strict=True)]
    powers = range(len(roots), -1, -1)
    product = str(factor) + "".join(f"(x - {root})".replace("- -", "+ ") for root in roots)
    expanded = " + ".join(f"{coefficient}x^{{{power}}}" for coefficient, power in zip(coefficients, powers, strict=True))
    assert equivalent(product, expanded.replace("+ -", "- "))
    assert not equivalent(product, expanded + "+1")


def test_hostile_answers_neither_run_nor_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(symbolic, "CPU_SECONDS", 0.5)
    monkeypatch.setattr(math_answers, "_worker", math_answers._Worker())
    code = f"open('{tmp_path}/made', 'w')", "__import__('os').system('true')"
    for text in (*code, "(" * 990, "{" * 990, "9" * 990, r"\text{" * 100, "99!!!!", "9" * 9999, "=" * 990, "x<" * 490):
        assert not equivalent(text, "x+1")
    assert not list(tmp_path.iterdir())
    for tower in ("9^{9^{9^{9}}}", "9**9**9**9", "2" + "^2" * 400):
        assert not equivalent(tower, "x+1"), "these are ended by the kernel"
        assert math_answers._worker._process.poll() is not None
    assert equivalent("x+1", "1+x+0"), "and the next gets a new worker"


def test_an_interrupted_comparison_leaves_no_verdict_behind(monkeypatch):
    worker = math_answers._Worker()
    monkeypatch.setattr(math_answers, "_worker", worker)
    assert equivalent(r"\frac{\pi}{2}", r"0.5\pi")

    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(worker._process, "stdout", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            worker.equivalent("1", "2")
    assert equivalent(r"\frac{\pi}{2}", r"0.5\pi"), "not what was owed for the one before"


def test_long_and_broken_solutions_take_no_time():
    boxes = (r"\boxed{" * 20_000, r"\boxed{1}" * 20_000, r"\boxed{" + "9" * 5000 + "}")
    for text in (*boxes, "answer is " * 10_000, "answer:" + " " * 100_000, "#### " + "9" * 5000, "#### 1" + "=(" * 100_000):
        start = time.time()
        assert not any(correct(dataset, text, "7") for dataset in math_answers.DATASETS)
        assert time.time() - start < 10


@pytest.mark.parametrize(
    "generated, expected",
    [
        (r"so $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{1} and \boxed{ }", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{3}", "3"),
        (r"\boxed 5", "5"),
        ("**Final Answer:** $7$. I hope it is right.", "$7$"),
        ("The answer is 1.5.\nDone.", "1.5"),
        ("It is 7.", ""),
    ],
)
def test_boxed(generated, expected):
    assert boxed(generated) == expected


@pytest.mark.parametrize(
    "generated, expected",
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 20 - 5 = 15", "15"),
        ("#### 18 eggs (= 3 * 6)", "18"),
        ("#### 10 = 5 + 5", "10"),
        (r"\boxed{10 = 5 + 5}", "10"),
        ("#### $18 = 20 - 2", "18"),
        ("#### 18 = 9 * 2 eggs", "18"),
        ("#### 18 = 9 * 2 = 3 * 6", "18"),
        (r"\boxed{8 = 2^3}", "8"),
        ("#### 20 - 5 = 15 eggs", "15"),
        ("#### 20 - 5 = 15 eggs in 3 days", "15"),
        ("#### 3 = three", "3"),
        ("#### 1 000", "1000"),
        ("#### \u22125", "-5"),
        ("#### \u20135", "-5"),
        ("#### **18**", "18"),
        ("#### 5 m^2", "5"),
        (r"\boxed{5 \text{ m}^2}", "5"),
        (r"\boxed{\frac{7}{2}}", "7/2"),
        (r"\boxed{1\frac12 \text{ hours}}", "3/2"),
        (r"\boxed{18 \text{ eggs in 3 days}}", "18"),
        (r"\boxed{\text{it is 5}}", "5"),
        (r"\boxed{20 - 5 = 15}", "15"),
        ("pages 3\u20135", "5"),
        ("#### 1,450 dollars for 3 days", "1450"),
        ("#### -$2.50", "-2.50"),
        ("#### none", None),
        ("#### Step 1: Add 3 and 4\n3 + 4 = 7\n\nThe answer is \\boxed{7}", "7"),
        ("#### Final answer: 3 + 4 = 7", "7"),
        ("####7\n#### ", "7"),
        (r"#### $\boxed{12}$ of 30", "12"),
        (r"so \boxed{18} eggs in 3 days", "18"),
        ("#### 1. Eggs left\n16 - 7 = 9\n\n#### 2. Money\n9 * 2 = 18\n\nThe answer is \\boxed{18}.", "18"),
        ("#### 1. Eggs left\n16 - 7 = 9\n\n#### **2) Money**\n9 * 2 = **18**", "18"),
        ("#### 9 eggs\n#### Money\n9 * 2 = 18, so \\boxed{18}", "18"),
        ("#### 18\nwhich is \\boxed{\\text{right}}", "18"),
        ("#### 2.5", "2.5"),
        ("The answer is 18. He sold 9.", "18"),
        ("The answer is $18 for 9 eggs.", "18"),
        ("The answer is, for 9 eggs, $18.", "18"),
        ("He pays $1,000,000 a year.", "1000000"),
        ("16-3 is left", "3"),
        ("minus: -3.", "-3"),
        ("none", None),
    ],
)
def test_last_number(generated, expected):
    assert last_number(generated) == (expected and Fraction(expected))


@pytest.mark.parametrize(
    "dataset, generated, answer, expected",
    [
        ("gsm8k", "#### 18.00", "18", True),
        ("gsm8k", "The answer is 18.", "16 - 3 = 13\n#### 18", True),
        ("gsm8k", "The answer is 81.", "18", False),
        ("gsm8k", "no idea", "none", False),
        ("math500", r"\boxed{x^2-1}", "(x+1)(x-1)", True),
        ("math500", "(x+1)(x-1)", "(x+1)(x-1)", False),
        ("aime24", r"\boxed{73}", "073", True),
        ("aime24", r"\boxed{m+n=073}", "73", True),
        ("aime25", r"\boxed{\textbf{(113)}}", "113", True),
        ("gsm8k", r"\boxed{\frac{7}{2}}", "2", False),
        ("math500", r"The answer is \(5\).", "5", True),
        ("aime24", r"\boxed{\(73\)}", "73", True),
        ("aime24", r"\boxed{7 3}", "73", False),
        ("aime24", r"\boxed{{204}}", "204", True),
        ("aime24", r"\boxed{204 = 12 \cdot 17}", "204", True),
        ("aime24", r"\boxed{204 = 12 \cdot 17}", "17", False),
        ("aime24", r"\boxed{204 = 205}", "204", False),
        ("aime25", r"\boxed{113.5}", "113", False),
        ("aime25", r"\boxed{1113}", "1113", False),
        ("aime25", "113", "113", False),
    ],
)
def test_correct(dataset, generated, answer, expected):
    assert correct(dataset, generated, answer) is expected


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="'gsm'; those of mathematics are gsm8k, math500, aime24, aime25"):
        correct("gsm", "", "")
    monkeypatch.setattr(math_answers, "_worker", math_answers._Worker())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert equivalent("1/2", "0.5"), "numbers do without sympy"
    with pytest.raises(ImportError, match="sympy"):
        equivalent("x+1", "1+x")
