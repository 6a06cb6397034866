"""Whether two mathematical answers, in LaTeX or plain text, say the same.

An answer is cleaned of what LaTeX adds for its looks, taken apart into its sets, tuples, intervals and matrices, and compared element by
element: as strings, then as numbers, then by sympy. The parser that turns LaTeX into sympy objects is our own: sympy's hand the text to Python's
`eval` or need antlr, and a generated answer may be any text; and math-verify, which Hugging Face keeps, takes 33 of the 79 pairs of different answers in
the tests for the same (LOG.md, 2026-11-30).

This file imports nothing of the package. Run as a program, with CPU_SECONDS as its argument, it is the worker of math_answers.py, which may be ended at
any time: a line of JSON in, [given, wanted], and a line out, 1 or 0.
"""

import json
import random
import re
import resource
import signal
import sys
from fractions import Fraction

CPU_SECONDS = 3.0  # for one comparison in the worker; after it the kernel ends the worker
MEMORY = 2**31  # bytes that the worker may allocate
MAX_CHARS = 1000  # of an answer that is read, and of a number

# Cleaning: strings to strings.

_END = "(?![A-Za-z])"  # of a command's name
_BRACED = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
TEXT = rf"\\(?:text|mbox|textbf|textit|textrm|textnormal|mathrm|mathbf|boldsymbol|operatorname)\s*{_BRACED}"
_FUNCTION = "(?:arc)?(?:sin|cos|tan|cot|sec|csc)|log|ln"
_POWER = r"(?:\s*(?:\^\s*\{?\s*-?\d\s*\}?|[²³]|squared|cubed))?"
_SUBSTITUTES = [
    (r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|[cm]m|in)\s*\]", r"\\\\ "),  # the space between rows
    (rf"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits){_END}", ""),
    (rf"\\([lr])brace{_END}", lambda match: r"\{" if match[1] == "l" else r"\}"),
    (r",(?:\\!\s*)+|\{,\}", ","),  # a comma of thousands
    (rf"(?<!\\)\\[!,;:> $%()\[\]]|~|[$%€£]|\\q?quad{_END}", " "),
    (rf"\\(?:mathrm|operatorname)\s*\{{\s*([ied]|{_FUNCTION})\s*\}}", r" \1 "),
    (r"[(\[]\s*\\begin\{(array|(?:small)?matrix)\}(?:\s*\{[clr|\s]*\})?(.*?)\\end\{\1\}\s*[)\]]", r"\\begin{pmatrix}\2\\end{pmatrix}"),
    (r"_\s*\{\s*\(\s*(\w+)\s*\)\s*\}", r"_{\1}"),  # 52_{(8)}
    (rf"\^\s*(?:\{{\s*\\circ\s*\}}|\\circ{_END})|\\degree{_END}|°", " "),
    (rf"\\[dtc]frac{_END}", r"\\frac"),
    (rf"\\langle{_END}", "("),
    (rf"\\rangle{_END}", ")"),
    (rf"\\[lr]?vert{_END}", "|"),
    (rf"\\(?:cdot|times|ast){_END}|[×·]", "*"),
    (rf"\\div{_END}|÷", "/"),
    (r"\*\*", "^"),
    (rf"\\(?:leq?|leqslant){_END}|≤|<=", r"\\le "),
    (rf"\\(?:geq?|geqslant){_END}|≥|>=", r"\\ge "),
    (rf"\\lt{_END}", "<"),
    (rf"\\gt{_END}", ">"),
    (rf"\\neq?{_END}|≠", r"\\ne "),
    (r"∈", r"\\in "),
    (rf"\\varnothing{_END}|\\\{{\s*\\\}}|∅", r"\\emptyset "),
    (r"[−–]", "-"),
    (r"∞", r"\\infty "),
    (r"√", r"\\sqrt "),
    (r"π", r"\\pi "),
    (rf"∪|\\bigcup{_END}", r"\\cup "),
    (r"≈", r"\\approx "),
    (r"±", r"\\pm "),
    (rf"(?<![\\A-Za-z])(sqrt|pi|infty|{_FUNCTION}){_END}", r"\\\1 "),
    (r"\\text\s*\{\s*,?\s*(?:or|and)\s*\}|(?<=[\s\d})\],])(?:or|and)(?=\s)", ","),
    (r"(?<![\d.)}\]])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),  # 1 4/5
    (r"(?<![\w.^])\d{1,3}(?:\s+\d{3})+(?!\d)", lambda match: "".join(match[0].split())),  # 58 500
    (r"[\s.,;:]+$", ""),
]
# Words behind a number are its unit, but not those that change it (5 million, 3 or more, 9 a.m.), nor a letter that is no unit (2\text{i}).
_CHANGES = r"or|and|more|less|to|times|mod\w*|base|negative|squared|cubed|factorial|[ap]m|alpha|beta|gamma|delta|theta|lambda|phi|omega"
_CHANGES += r"|half|halves|(?:third|fourth|fifth|sixth|eighth|tenth)s?|dozens?|(?:(?:hundred|thousand)(?:th)?|[bmtr]+illion)s?"
_NO_UNIT = rf"(?!(?i:{_CHANGES})\b|[a-z](?<![ghlms])\b)"
_IN_TEXT = rf"\\(?:text|mbox|textrm|textnormal|mathrm)\s*\{{\s*/?\s*{_NO_UNIT}[A-Za-z][^{{}},\d]*?{_POWER}\s*\}}{_POWER}"
_SHORT_UNIT = "[ckm]m|[km]g|m[lL]|ft|[km]ph|sq|cu|per|day|way|cup|ton|degrees?|percent"  # outside of \text{} other short words are products of letters
_IN_LINE = rf"(?:\s*(?:{_SHORT_UNIT}){_END}|\s+{_NO_UNIT}[A-Za-z]{{4,}})(?:[\s./]+[A-Za-z]+)*\.?{_POWER}"
_UNITS = re.compile(rf"(?:(?<=[\d)\]}}!|])|(?<=\\pi)|(?<=\d[a-z]))(?:(?:\s*/?\s*{_IN_TEXT})+|{_IN_LINE})\s*$")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{\s*(\d+)\s*\}")
_WORD = re.compile(r"(?=.*[A-Za-z]{3}|(?i:no|on)$)[A-Za-z]+(?:[\s'-]+[A-Za-z]+)*")  # not p - q or xy
_FRACTION = re.compile(r"([-+]?)(\d*)\\[dtc]?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))")
_CHOICE = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.:)])\s+(?!.*(?<![A-Za-z])[A-Z][.:)]|(?:.*,)?\s*[A-Z]\s*$)[^\s,].*", re.DOTALL)  # and no other one
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\.\d+|\S", re.DOTALL)


def clean(text: str) -> str:
    """`text` without dollar and percent signs, spaces of LaTeX, \\left and \\right, degrees, braces around it; signs with several spellings brought to one."""
    for pattern, new in _SUBSTITUTES:
        text = re.sub(pattern, new, text)
    text = _REPEATING.sub(_repeating, text).strip()
    while (inside := _brackets(text))[0] == "{}":
        text = inside[1].strip()
    return text


def _repeating(match: re.Match) -> str:
    """0.1\\overline{6} as a fraction."""
    before, after = match[1] + match[2] or "0", match[1] + match[2] + match[3]
    return rf"\frac{{{int(after) - int(before)}}}{{{(10 ** len(match[3]) - 1) * 10 ** len(match[2])}}}"


def bare(text: str) -> str:
    """Clean `text` without its unit, \\text{...} around words, brackets around one letter or number and commas of thousands."""
    text = _UNITS.sub("", re.sub(TEXT, r"\1", _UNITS.sub("", text)))
    text = re.sub(r"[\s.,;:]+$", "", text).strip()  # \text{ellipse.}
    return thousands(re.sub(r"^\(\s*([A-Za-z]|\d+)\s*\)$", r"\1", text))


def choice(text: str) -> str:
    """The letter of a clean text that is a choice with its letter, as in (C) 5 or C. 5; any other text as it is."""
    found = _CHOICE.fullmatch(re.sub(TEXT, r"\1 ", text))
    return found[1] or found[2] if found else text


def exact(text: str, wanted: str) -> str:
    """What a clean text says before an approximation that it adds, as in \\sqrt2 \\approx 1.41, but not x of x \\approx 1.41, unless that is wanted."""
    before = _pieces(text, r"\approx")[0]
    return before if before and (not _is_name(before) or same_string(before, wanted)) else text


def thousands(text: str) -> str:
    """`text` without the commas of a number that begins it or follows its equals sign."""
    return re.sub(r"(?:^|=)\s*[-+]?\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)


def fraction(text: str) -> Fraction | None:
    """The number that bare `text` is, written as 12, -1.5, .5, 3/4, \\frac{3}{4} or 1\\frac{3}{4}; else None."""
    if len(text) > MAX_CHARS:  # Python refuses integers of more than 4300 digits
        return None
    text = re.sub(r"(?<![\d.])\s+|\s+(?![\d.])", "", text)  # 1 0 is no number
    try:
        if mixed := _FRACTION.fullmatch(text):
            value = int(mixed[2] or 0) + Fraction(int(mixed[3] or mixed[4]), int(mixed[5] or mixed[6]))
            return -value if mixed[1] == "-" else value
        return Fraction(re.sub(r"^([-+]?)\.", r"\g<1>0.", text)) if re.fullmatch(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+|\d+/\d+)", text) else None
    except ZeroDivisionError:
        return None


def same_string(first: str, second: str) -> bool:
    """Whether two clean texts have the same tokens once bare; words are compared in lower case."""
    first, second = bare(first), bare(second)
    if _WORD.fullmatch(first) and _WORD.fullmatch(second):
        return first.casefold().split() == second.casefold().split()
    return _TOKEN.findall(first) == _TOKEN.findall(second)


# Taking apart: strings to trees. A leaf is a string, a node (kind, children), its kind "set", "union", "row", "matrix", a pair of brackets, or "=" for
# what has names in front of its value: x = 5, x \in [1, 2]; the children are the names, as strings, and the value's tree.

_NAME = re.compile(  # x, x_1, x_{\max}, Area, \vec{v}, f(x), f^{-1}(x)
    r"\\?[A-Za-z][A-Za-z\s]*(?:\{[A-Za-z]+\})?(?:_(?:\w|\\[A-Za-z]+|\{[^{}]*\}))?(?:\^(?:-1|\{-1\}))?(?:\([^()]*\))?"
)
_UNORDERED = ("set", "union")
_OPEN, _CLOSE = ("(", "[", "{", r"\{", r"\begin"), (")", "]", "}", r"\}", r"\end")


def read(text: str):
    """The tree of a clean text."""
    kind, inside = _brackets(text.strip())
    if kind == r"\{\}":
        return read(inside)
    if len(parts := _split(inside, ",")) > 1:
        return kind, [read(part) for part in parts]
    elements = [one for part in _split(text, ",", ";") for one in _signs(part)]
    if len(elements) > 1:
        return "set" if any(_interval(one) == one for one in elements) else "union", [read(one) for one in elements]
    *names, text = _split(_interval(text), "=", r"\in") or [""]
    if names:
        return "=", [*names, read(text)]
    union = _split(text, r"\cup")
    if len(union) > 1:
        return "union", [read(part) for part in union]
    if matrix := re.fullmatch(r"\\begin\{([pbB]?matrix)\}(.*)\\end\{\1\}", text, re.DOTALL):
        return "matrix", [("row", [read(cell) for cell in _split(row, "&")]) for row in _split(matrix[2], r"\\")]
    return text


def _interval(text: str) -> str:
    """`text`, or as x \\in (1, 2] what says of one letter that 1 < x \\le 2, or one half of it."""
    parts = _pieces(text, "<", ">", r"\le", r"\ge")
    if set(parts[1::2]) <= {">", r"\ge"}:
        parts.reverse()
    elif not set(parts[1::2]) <= {"<", r"\le"}:
        return text
    if len(parts) == 3 and _is_letter(parts[0]) != _is_letter(parts[2]):
        parts = [r"-\infty", "<", *parts] if _is_letter(parts[0]) else [*parts, "<", r"\infty"]
    if len(parts) != 5 or not _is_letter(parts[2]):
        return text
    return rf"{parts[2]} \in {'(' if parts[1] in '<>' else '['}{parts[0]},{parts[4]}{')' if parts[3] in '<>' else ']'}"


def _is_letter(text: str) -> bool:
    """Whether `text` may be an unknown."""
    return bool(re.fullmatch("[A-Za-z]", text)) and text not in ("e", "i") or text.startswith("\\") and text[1:] in _GREEK


def _is_name(text: str) -> bool:
    """Whether `text` is a name or a tuple of names."""
    kind, inside = _brackets(text)
    return all(_NAME.fullmatch(bare(part)) for part in _split(inside if kind == "()" else text, ","))


def _split(text: str, *separators: str) -> list[str]:
    """The parts of `text` between separators that stand in no brackets; empty ones are dropped."""
    return [part for part in _pieces(text, *separators)[::2] if part]


def _pieces(text: str, *separators: str) -> list[str]:
    """The parts of `text` and, between them, the separators in no brackets."""
    parts, depth = [""], 0
    for piece in re.findall(r"\\[A-Za-z]+|\\.|.", text, re.DOTALL):
        depth += (piece in _OPEN) - (piece in _CLOSE)
        if depth == 0 and piece in separators:
            parts += [piece, ""]
        else:
            parts[-1] += piece
    return [part.strip() for part in parts]


def _brackets(text: str) -> tuple[str, str]:
    """The pair of brackets around all of `text` and what they hold; two empty strings where there is none."""
    pieces = re.findall(r"\\[A-Za-z]+|\\.|.", text, re.DOTALL)
    depth = 0
    for at, piece in enumerate(pieces):
        depth += (piece in _OPEN) - (piece in _CLOSE)
        if depth == 0:
            outer = at > 0 and at == len(pieces) - 1
            return (pieces[0] + piece, "".join(pieces[1:-1])) if outer else ("", "")
    return "", ""


def _signs(text: str) -> list[str]:
    """`text`, or the two texts that \\pm and \\mp in it stand for; a set in it sees to its own."""
    if r"\{" in text or not re.search(rf"\\(?:pm|mp){_END}", text):
        return [text]
    return [re.sub(rf"\\mp{_END}", other, re.sub(rf"\\pm{_END}", sign, text)) for sign, other in ("+-", "-+")]


# Reading leaves: a string to a sympy expression.

_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega "
    "Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell"
).split()
_TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")
_FUNCTIONS = {name: name for name in (*_TRIGONOMETRIC, "log", "exp")} | {f"arc{name}": f"a{name}" for name in _TRIGONOMETRIC} | {"ln": "log"}


class Unreadable(ValueError):
    """A text is no expression that the parser knows."""


class Parser:
    """Recursive descent over the tokens of one leaf.

    whole = sum [\\over sum]; sum = product {(+|-) product}; product = [-] power {[*|/] power}; power = atom {^ exponent | !};
    exponent = [-] atom [^ exponent].
    """

    def __init__(self, text: str):
        import sympy

        self._sympy = sympy
        self._tokens = _TOKEN.findall(text)
        self._at = 0
        self._bars = 0  # open absolute values

    def expression(self):
        """The whole text as a sympy expression. Raises Unreadable."""
        value = self._whole()
        if self._peek() or value.has(self._sympy.nan, self._sympy.zoo):
            raise Unreadable
        return value

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *wanted: str) -> str:
        token = self._peek()
        if not token or (wanted and token not in wanted):
            raise Unreadable
        self._at += 1
        return token

    def _whole(self):
        value = self._sum()
        return value / self._sum() if self._peek() == r"\over" and self._take() else value

    def _sum(self):
        total = self._product()
        while self._peek() in ("+", "-"):
            total = total + self._product() if self._take() == "+" else total - self._product()
        return total

    def _product(self):
        if self._peek() in ("+", "-"):
            return self._product() if self._take() == "+" else -self._product()
        value = self._power()
        while True:
            token = self._peek()
            if token == "*":
                self._take()
                value = value * self._signed()
            elif token == "/":
                self._take()
                value = value / self._signed()
            elif self._starts_factor(token):
                value = value * self._power()
            else:
                return value

    def _signed(self):
        return -self._power() if self._peek() == "-" and self._take() else self._power()

    def _starts_factor(self, token: str) -> bool:
        if token == "|":
            return not self._bars
        if re.match(r"[\d.]", token) and re.match(r"[\d.]", self._tokens[self._at - 1]):
            return False  # 2 3 is no product
        return bool(re.match(r"[\w(\[{.]|\\[A-Za-z]", token)) and token not in ("_", r"\over")

    def _power(self):
        value = self._atom()
        while self._peek() in ("^", "!"):
            value = value ** self._exponent() if self._take() == "^" else self._sympy.factorial(value)
        return value

    def _exponent(self):
        """From the right: 2^3^2 is 2^9."""
        if self._peek() == "-" and self._take():
            return -self._exponent()
        value = self._atom()
        return value ** self._exponent() if self._peek() == "^" and self._take() else value

    def _argument(self, digit: bool = False):
        """What a command or ^ applies to. `digit`: one digit of a number, as in \\frac43."""
        token = self._peek()
        if digit and token.isdigit() and len(token) > 1:
            self._tokens[self._at] = token[1:]
            return self._sympy.Integer(token[0])
        return -self._atom() if token == "-" and self._take() else self._atom()

    def _subscript(self) -> str:
        """The text of a subscript, if one follows."""
        if self._peek() != "_":
            return ""
        self._take()
        if self._peek() != "{":
            return "_" + self._take()
        text = ""
        while (token := self._take()) != "}":
            text += token.strip("{")
        return "_" + text

    def _atom(self):
        sympy, token = self._sympy, self._take()
        if token[0] in "0123456789.":
            return self._number(token)
        if token in ("(", "[", "{"):
            value = self._whole()
            self._take({"(": ")", "[": "]", "{": "}"}[token])
            return value
        if token == "|":
            self._bars += 1
            value = self._sum()
            self._bars -= 1
            self._take("|")
            return sympy.Abs(value)
        name = token.lstrip("\\")
        if re.fullmatch("[A-Za-z]", token) or name in _GREEK:
            name += self._subscript()
            return {"e": sympy.E, "i": sympy.I}.get(name) or sympy.Symbol(name, real=True)
        if name in _FUNCTIONS:
            return self._function(name)
        if name == "frac":
            return self._argument(digit=True) / self._argument(digit=True)
        if name == "binom":
            return sympy.binomial(self._argument(digit=True), self._argument(digit=True))
        if name == "sqrt":
            return self._root()
        if name in ("pi", "infty"):
            return sympy.pi if name == "pi" else sympy.oo
        raise Unreadable

    def _number(self, token: str):
        value = self._sympy.Rational(token)
        if base := self._subscript():  # 52_8: the digits and the base are the answer, not the value
            return self._sympy.Symbol(token + base)
        if token.isdigit() and self._peek() == r"\frac":
            part = self._atom()
            return value + part if part.is_Rational else value * part
        return value

    def _root(self):
        degree = 2
        if self._peek() == "[" and self._take():
            degree = self._sum()
            self._take("]")
        return self._sympy.root(self._argument(), degree)

    def _function(self, name: str):
        base, power = self._subscript(), 1
        if self._peek() == "^" and self._take():
            power = self._argument()
        if power == -1 and name in _TRIGONOMETRIC:
            name, power = f"arc{name}", 1
        if self._peek() in ("(", "{", "["):
            value = self._atom()
        else:
            value = self._signed()
            while self._starts_factor(self._peek()) and self._peek() != "(" and self._peek().lstrip("\\") not in _FUNCTIONS:
                value = value * self._power()
        arguments = (value, Parser(base[1:]).expression()) if base else (value,)
        return getattr(self._sympy, _FUNCTIONS[name])(*arguments) ** power


# Comparing.


def equivalent(given: str, wanted: str) -> bool:
    """Whether two clean answers say the same; 58,500 is read as one number and as two."""
    return any(same(read(view(given)), read(view(wanted))) for view in (str, thousands))


def same(given, wanted) -> bool:
    """Whether two trees say the same. Where only one of them names its value, the name is left out: a given answer may have in front what has a value,
    as 2 + 3 = 5, a wanted one only a name."""
    named = [not isinstance(tree, str) and tree[0] == "=" for tree in (given, wanted)]
    if all(named):
        return (same_string(given[1][0], wanted[1][0]) and same(given[1][-1], wanted[1][-1])) or _same_equation(given[1], wanted[1])
    if any(named):
        *left, value = (given if named[0] else wanted)[1]
        return same(value, wanted) and any(_has_value(one, value) for one in left) if named[0] else _is_name(left[0]) and same(given, value)
    if isinstance(given, str) and isinstance(wanted, str):
        return same_string(given, wanted) or _same_value(bare(given), bare(wanted))
    if isinstance(given, str) or isinstance(wanted, str) or given[0] != wanted[0] or len(given[1]) != len(wanted[1]):
        return False
    if given[0] not in _UNORDERED:
        return all(map(same, given[1], wanted[1]))
    left = list(wanted[1])
    for one in given[1]:  # the first match: another could be needed only where some name their values and some do not
        match = next((other for other in left if same(one, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _has_value(left: str, value) -> bool:
    """Whether `left` = `value` gives the value of `left`, as a + b = 5, and is no equation to solve, as 2x = 6, x + 1 = 6 or x + y = 0."""
    import sympy

    if _is_name(left) or re.search(r"(?<![A-Za-z])[fghEP]'*\(", left):
        return True
    try:
        left = Parser(re.sub(TEXT, "", left)).expression()
    except Unreadable:  # words, \overline{AB}, \sum
        return True
    if not left.free_symbols or isinstance(left, sympy.Symbol | sympy.Function):  # 52_8, |z|
        return True
    is_zero = isinstance(value, str) and fraction(bare(value)) == 0
    return len(left.free_symbols) > 1 and not is_zero and not left.as_coeff_Add()[0] and left.atoms(sympy.Number) <= {1, -1}


def _same_value(first: str, second: str) -> bool:
    """Whether two bare texts that differ as strings are equal numbers or expressions."""
    numbers = fraction(first), fraction(second)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if _WORD.fullmatch(first) or _WORD.fullmatch(second):
        return False  # no product of letters
    try:
        return _equal(*(Parser(text).expression() for text in (first, second)))
    except Unreadable:
        return False


def _same_equation(first: list, second: list) -> bool:
    """Whether one of two equations, each given by its sides, is a constant multiple of the other."""
    if len(first) != 2 or len(second) != 2 or not isinstance(first[1], str) or not isinstance(second[1], str):
        return False
    try:
        first, second = (Parser(bare(left)).expression() - Parser(bare(right)).expression() for left, right in (first, second))
    except Unreadable:
        return False
    point = _points(first, second)[0]
    scales = first.subs(point), second.subs(point)
    return 0 not in scales and _equal(first * scales[1], second * scales[0])


def _equal(first, second) -> bool:
    """Whether two expressions are equal for all real values of their symbols."""
    import sympy

    if first == second:
        return True
    if first.has(sympy.oo, sympy.S.NegativeInfinity) or second.has(sympy.oo, sympy.S.NegativeInfinity):
        return False
    for point in _points(first, second):  # refutes nearly all that differ in no time; proofs may take long
        values = [one.evalf(30, subs=point) for one in (first, second)]
        gap, size = abs(values[0] - values[1]), abs(values[0]) + abs(values[1])
        if gap.is_finite and size.is_finite and gap > 1e-15 * size:
            return False
    return bool((first - second).equals(0))


def _points(first, second) -> list[dict]:
    """Four places, always the same, at which to try expressions in their symbols."""
    import sympy

    draw = random.Random(0)
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    return [{symbol: sympy.Rational(draw.randint(-300, 300), 97) for symbol in symbols} for _ in range(4)]


def serve(cpu_seconds: float):
    """Answers the lines of standard input until it ends, or a line takes more than `cpu_seconds`."""
    import sympy  # noqa: F401  before the limits, and not in the first answer's time

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        # What the kernel does when the time is up, it does amid an operation on huge integers too, where no handler of Python's would run.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            found = equivalent(*json.loads(line))
        except Exception:  # sympy's errors are of many kinds, and each means that nothing was shown
            found = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(found), flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
