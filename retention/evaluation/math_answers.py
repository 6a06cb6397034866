"""Final answers of generated solutions to mathematical problems: where they stand, and whether they are right."""

import importlib.util
import json
import re
import subprocess
import sys
import threading
from fractions import Fraction

from retention.evaluation import symbolic

DATASETS = ("gsm8k", "math500", "aime24", "aime25")


def correct(dataset: str, generated: str, answer: str) -> bool:
    """Whether the final answer of the solution `generated` is `answer`, by the rule of `dataset`.

    gsm8k: the numbers are equal. math500: the answers are `equivalent`. aime24, aime25: both are the same integer from 0 to 999.
    Raises ValueError for an unknown data set, ImportError where math500 needs sympy and it is missing.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; those of mathematics are {', '.join(DATASETS)}")
    if dataset == "gsm8k":
        number = last_number(generated)
        return number is not None and number == last_number(answer)
    if dataset == "math500":
        return equivalent(boxed(generated), answer)
    given = boxed(generated)
    sides = reversed(given.split("=")) if len(given) <= symbolic.MAX_CHARS else ()  # m + n = 113, 204 = 12 * 17
    number = next((value for side in sides if (value := symbolic.fraction(symbolic.bare(symbolic.clean(side)))) is not None), None)
    return number in range(1000) and number == symbolic.fraction(answer)


def last_number(generated: str) -> Fraction | None:
    """The number on the line of the last "####" with one right behind it, which a heading has not, or in the last \\boxed{...}, whichever comes later;
    without them, that behind the last "answer is" or "answer:" in its sentence; without that, the last in the text. None where there is no number.

    Commas of thousands, currency signs and units are left out. Of several numbers behind "####", and behind "answer is" where one begins, the first
    counts, of those in a box the last, but first of all one alone on a side of an equals sign.
    """
    number, parts = None, generated.split("####")
    for i in reversed(range(1, len(parts))):
        # A heading may be numbered: #### 2. Money
        if found := re.match(r"(?![\s*]*\d+[.)]\s+\**[A-Za-z])(?:\\[a-z]+|[^\w#])*\d", parts[i]):
            number = _number(found[0] + parts[i][found.end() :].partition("\n")[0], 0)
            parts = parts[i:]
            break
    box = _number(_boxed("####".join(parts)), -1)
    number = number if box is None else box
    if number is None:
        answer = _said(generated)
        number = _number(answer, 0 if re.match(r"\W*\d", answer) else -1)
    return symbolic.fraction((_numbers(generated) or [""])[-1]) if number is None else number


def _number(answer: str, place: int) -> Fraction | None:
    """The number that a marked answer is: of the sides of its equals signs, from the right, the first with just one number, as in 20 - 5 = 15 and in
    15 = 20 - 5; without one, the number at `place` in the first with any."""
    sides = re.split(r"=(?![^()]*\))", answer[: symbolic.MAX_CHARS].replace("**", ""))  # 18 (= 3 * 6) is one; ** is bold
    found = [numbers for side in reversed(sides) if (numbers := _side(symbolic.clean(side)))]
    return next((numbers[0] for numbers in found if len(numbers) == 1), found[0][place] if found else None)


def _side(text: str) -> list[Fraction | None]:
    """The number that a clean text is, or else those in it, without exponents of units and, where there are others, those in words."""
    if (number := symbolic.fraction(symbolic.bare(text))) is not None:
        return [number]
    text = re.sub(r"(?<![\d\s])\s*\^\s*(?:-?\d+|\{[^{}]*\})", "", text)
    return [symbolic.fraction(number) for number in _numbers(re.sub(symbolic.TEXT, "", text)) or _numbers(text)]


def _numbers(text: str) -> list[str]:
    text = re.sub(r"\\[!,$]|\$|(?<=\{),(?=\})", lambda match: match[0] if match[0] == "," else "", text).replace("{,}", ",")
    text = re.sub("[−–]", "-", text)
    # A minus sign belongs to the number unless it stands behind an operand, as in 16-3.
    found = re.findall(r"(?:(?<![\w.)])-)?(?:\\[dtc]?frac\{\d+\}\{\d+\}|\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?)|\.\d+", text)
    return [number.replace(",", "") for number in found]


def boxed(generated: str) -> str:
    """What stands in the last \\boxed{...} (or \\fbox{...}) that is closed and not empty: the answer as MATH and AIME ask for it.

    Without one, what follows the last "answer is" or "answer:" in its sentence; without that, an empty string.
    """
    return _boxed(generated) or _said(generated)


def _boxed(generated: str) -> str:
    found, open_braces = {}, []  # the contents of boxes by where they begin; where each open brace begins, if it is a box's
    for match in re.finditer(r"\\(?:boxed|fbox)\s*(?:\{|(\d+|[A-Za-z]))|\\.|[{}]", generated, re.DOTALL):
        if match[1]:  # \boxed 5
            found[match.start()] = match[1]
        elif match[0] == "{" or len(match[0]) > 2:
            open_braces.append(match.end() if len(match[0]) > 2 else None)
        elif match[0] == "}" and open_braces and (start := open_braces.pop()):
            found[start] = generated[start : match.start()].strip()
    return next((found[start] for start in sorted(found, reverse=True) if found[start]), "")


def _said(generated: str) -> str:
    said = re.findall(r"(?i)\banswer(?: is|:)[:*\s]*(\S[^\n]*)", generated)
    return re.split(r"\.(?:\s|$)", said[-1].replace("*", ""))[0].strip() if said else ""


def equivalent(given: str, wanted: str) -> bool:
    """Whether two answers in LaTeX or plain text say the same.

    Alike are: 1/2, \\frac12, 0.5 and .5; 1\\frac{4}{5} and 9/5; 58,500, 58 500 and 58500; 90^\\circ and 90; 5 \\text{ cm} and 5 (words behind a number,
    currency and percent signs are left out); x=5 and 5; x \\in [1,2], 1 \\le x \\le 2 and [1,2]; 1 \\pm 2 and 3, -1; \\text{(C)} and C; words in any case;
    equations of which one is a multiple of the other; and what sympy finds equal, letters standing for real numbers and i for the imaginary unit. Lists
    with commas, sets and unions are compared in any order, tuples, intervals and matrices in theirs. Decimals are exact: 0.333 is not 1/3.

    A given answer may say more than the wanted one: what has the value, as a+b=5 for 5 (not 2x=6 for 6), a choice's text behind its letter, (C) 5 for C,
    or a number that is nearly the value, \\sqrt2 \\approx 1.41 for \\sqrt2.

    An answer that cannot be parsed, or has over symbolic.MAX_CHARS characters, equals only the same string. A comparison that takes longer than
    symbolic.CPU_SECONDS, or too much memory, counts as different. Raises ImportError where sympy is needed and missing.
    """
    if max(len(given), len(wanted)) > symbolic.MAX_CHARS:
        return given == wanted
    given, wanted = symbolic.clean(given), symbolic.clean(wanted)
    if not given or not wanted:
        return False
    if r"\approx" not in wanted:
        given = symbolic.exact(given, wanted)
    if re.fullmatch("[A-Z]", symbolic.bare(wanted)):
        given = symbolic.choice(given)
    if symbolic.same_string(given, wanted):
        return True
    numbers = [symbolic.fraction(symbolic.bare(one)) for one in (given, wanted)]
    return numbers[0] == numbers[1] if None not in numbers else _worker.equivalent(given, wanted)


class _Worker:
    """Runs symbolic.py in a process of its own, the only place where a comparison of any text can be ended at any time."""

    def __init__(self):
        self._process = None
        self._lock = threading.Lock()

    def equivalent(self, given: str, wanted: str) -> bool:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                if importlib.util.find_spec("sympy") is None:
                    raise ImportError("comparing these answers needs sympy; install it with `pip install -e '.[data]'`")
                command = [sys.executable, "-P", symbolic.__file__, str(symbolic.CPU_SECONDS)]
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            try:
                print(json.dumps([given, wanted]), file=self._process.stdin, flush=True)
                found = self._process.stdout.readline()
            except BaseException:  # such as Ctrl-C: what it still owes would be the next one's answer
                self._process.kill()
                self._process.wait()
                raise
            if not found:
                self._process.wait()  # it ended itself: out of time
            return found == "1\n"


_worker = _Worker()
