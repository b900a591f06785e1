r"""Whether two answers to a problem of mathematics are one: numbers, fractions, roots, tuples, intervals, matrices.

1/2, 0.5 and \frac{1}{2} are, (x+1)^2 and x^2+2x+1 are; 0.33 and 1/3 are not. Words are compared as words. What is read
is the notation of MATH's answers (Hendrycks et al. 2021, arXiv 2103.03874); units, dollars, percent and degrees count
for nothing, as in that paper's comparison.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from zlib import crc32

from align.data.reasoning import boxed, final_answer

Value = Fraction | complex  # exact as long as an expression is rational

_LONGEST = 400  # characters of an answer that is read, not only compared; MATH's longest has under 200
_MOST_BITS = 4096  # of an exact power; larger ones are compared as floats
_TOLERANCE = 1e-9  # relative, of values that are not exact: 15 digits less what a few roots lose
_POINTS = 3  # sets of values of the variables on which two expressions must agree
_SPACES = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad|~|\s+")
_AND = re.compile(r"\\(?:text|mbox)\s*\{\s*(?:and|or)\s*\}|(?<=\d) (?:and|or) (?=[\d\\-])")
_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|bigl?|bigr?|Bigl?|Bigr?)(?![a-zA-Z])|\\\$|\$|\\[()\[\]](?![a-zA-Z])"
    r"|\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\\?%"
)
_WORDS = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textit|operatorname)\s*\{([^{}]*)\}")
_NAMED = re.compile(r"^(?:[a-zA-Z](?:\([a-zA-Z]\))?|\\[a-z]+)\s*(?:=|\\in(?![a-z]))\s*(?=.)")
_THOUSANDS = re.compile(r"(?<![\d,])(\d{1,3}(?:,\d{3})+)(?![\d,])")
_MIXED = re.compile(r"(?<![\w.}])(\d+)\s*(?:\\frac\{(\d+)\}\{(\d+)\}|\s(\d+)/(\d+))")
_MATRIX = re.compile(r"^\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}$", re.DOTALL)
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")  # a word: no product of variables
_TOKEN = re.compile(r"\s*(\d+\.?\d*|\.\d+|\\[a-zA-Z]+|.)", re.DOTALL)
_PAIRS = {"(": ")", "[": "]", "\\{": "\\}"}
_FUNCTIONS: Mapping[str, Callable[[complex], complex]] = {
    "\\sin": cmath.sin,
    "\\cos": cmath.cos,
    "\\tan": cmath.tan,
    "\\ln": cmath.log,
    "\\exp": cmath.exp,
}
_CONSTANTS = {"\\pi": complex(math.pi), "i": 1j, "e": complex(math.e)}


def math_answer(completion: str, answer: object) -> float:
    r"""1 if the completion's final answer is the row's, else 0. Column: answer, or a solution with it in \boxed{}."""
    if answer is None:
        raise ValueError("the row's answer is null")
    wanted, given = boxed(str(answer)), final_answer(completion)
    return float(given is not None and same_answer(given, wanted[-1] if wanted else str(answer)))


def same_answer(given: str, wanted: str) -> bool:
    """Whether two answers say the same."""
    one, other = _plain(given), _plain(wanted)
    if not one or _squeezed(one) == _squeezed(other):
        return bool(one)
    return max(len(one), len(other)) <= _LONGEST and _same(one, other)


def _plain(text: str) -> str:
    """An answer without what counts for nothing."""
    text = re.sub(r"\\[dtc]frac", r"\\frac", text.replace("\\!", "").strip().rstrip("."))
    text = _AND.sub(",", _MIXED.sub(_sum, text))
    rest = _WORDS.sub(" ", text)
    # words beside a value are its unit; by themselves they are the answer
    text = rest if re.search(r"[\w\\]", _DROPPED.sub("", rest)) else _WORDS.sub(r"\1", text)
    text = _SPACES.sub(" ", _DROPPED.sub("", text.replace("\\$", ""))).replace("\u2212", "-").strip()
    return _NAMED.sub("", _THOUSANDS.sub(lambda m: m[1].replace(",", ""), text)).strip()


def _sum(match: re.Match[str]) -> str:
    """1\\frac{1}{2} is one and a half, not one times a half."""
    whole, *parts = match.groups()
    above, below = [part for part in parts if part is not None]
    return f"(({whole})+({above})/({below}))"


def _squeezed(text: str) -> str:
    return re.sub(r"(?<!\d) | (?!\d)", "", text).casefold()  # two numbers side by side are not one


def _same(one: str, other: str) -> bool:
    matrices = _MATRIX.match(one), _MATRIX.match(other)
    if all(matrices):
        rows = [[row.split("&") for row in m[2].strip().removesuffix("\\\\").split("\\\\")] for m in matrices if m]
        shapes = [[len(row) for row in matrix] for matrix in rows]
        return shapes[0] == shapes[1] and _all_same(*([cell for row in matrix for cell in row] for matrix in rows))
    unions = [_parts(text, "\\cup") for text in (one, other)]
    if max(map(len, unions)) > 1:
        return _matched(*unions)
    lists = [_elements(text) for text in (one, other)]
    if max(len(elements) for _, elements in lists) > 1 or any(bracket == "\\{" for bracket, _ in lists):
        (bracket, mine), (wanted, theirs) = lists
        ordered = bracket not in ("", "\\{}")
        return bracket == wanted and (_all_same if ordered else _matched)(mine, theirs)
    return _equal(one, other)


def _elements(text: str) -> tuple[str, list[str]]:
    """The brackets around a list, tuple, set or interval, and what stands between its commas."""
    for opening in _PAIRS:
        for closing in _PAIRS.values():
            if text.startswith(opening) and text.endswith(closing):
                inside = text[len(opening) : -len(closing)]
                parts = _parts(inside, ",")
                if opening == "\\{" or len(parts) > 1 and all(parts):
                    return opening + closing.removeprefix("\\"), parts
    return "", _parts(text, ",")


def _parts(text: str, mark: str) -> list[str]:
    """A text taken apart at a mark where it stands in no bracket."""
    parts, depth, start, at = [], 0, 0, 0
    while at < len(text):
        if depth == 0 and text.startswith(mark, at):
            parts.append(text[start:at].strip())
            start = at = at + len(mark)
            continue
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[at], 0)
        at += 1
    return [*parts, text[start:].strip()]


def _all_same(one: Sequence[str], other: Sequence[str]) -> bool:
    return len(one) == len(other) and all(same_answer(a, b) for a, b in zip(one, other, strict=True))


def _matched(one: Sequence[str], other: Sequence[str]) -> bool:
    """The same in any order."""
    left = list(other)
    for part in one:
        found = next((i for i, candidate in enumerate(left) if same_answer(part, candidate)), None)
        if found is None:
            return False
        left.pop(found)
    return not left


# ---------------------------------------------------------------------- expressions


class _NotRead(ValueError):
    """A text that is no expression of those read here."""


def _equal(one: str, other: str) -> bool:
    try:
        values = [[_Expression(text, point).value() for text in (one, other)] for point in range(_POINTS)]
    except (_NotRead, ArithmeticError, RecursionError):
        return False
    return all(_close(a, b) for a, b in values)


def _close(a: Value, b: Value) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return cmath.isclose(complex(a), complex(b), rel_tol=_TOLERANCE, abs_tol=1e-12)


class _Expression:
    """An expression in LaTeX or plain notation with a value for its variables, read from left to right."""

    def __init__(self, text: str, point: int):
        if _PROSE.search(text):
            raise _NotRead(text)
        self._tokens = [token for token in _TOKEN.findall(text) if token.strip()]
        self._at = 0
        self._point = point

    def value(self) -> Value:
        """Of all of it."""
        found = self._terms()
        if self._next():
            raise _NotRead(self._next())
        return found

    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *wanted: str) -> str:
        token = self._next()
        if not token or wanted and token not in wanted:
            raise _NotRead(token)
        self._at += 1
        return token

    def _terms(self) -> Value:
        total = self._factors()
        while self._next() in ("+", "-"):
            sign = self._take()
            more = self._factors()
            total = _apply(total, more if sign == "+" else -more, "+")
        return total

    def _factors(self) -> Value:
        if self._next() in ("+", "-"):
            sign = self._take()
            inner = self._factors()
            return inner if sign == "+" else -inner
        product = self._power()
        while True:
            token = self._next()
            if token in ("/", "\\div"):
                self._take()
                product = _apply(product, self._power(), "/")
            elif token in ("*", "\\cdot", "\\times"):
                self._take()
                product = _apply(product, self._power(), "*")
            elif token and token not in ("+", "-", ")", "}", "]", "|", "=", ",", "^", "_", "!", "<", ">"):
                if token[0].isdigit():  # two numbers side by side are no product
                    raise _NotRead(token)
                product = _apply(product, self._power(), "*")
            else:
                return product

    def _power(self) -> Value:
        base = self._atom()
        if self._next() != "^":
            return base
        self._take()
        return _raised(base, self._argument())

    def _argument(self) -> Value:
        """A group in braces or, without them, one digit or atom: \\frac12 is a half."""
        token = self._next()
        if token == "{":
            return self._bracketed("{", "}")
        if len(token) > 1 and token.isdigit():
            self._tokens[self._at : self._at + 1] = list(token)
        if token == "-":
            self._take()
            return -self._argument()
        return self._atom()

    def _bracketed(self, opening: str, closing: str) -> Value:
        self._take(opening)
        found = self._terms()
        self._take(closing)
        return found

    def _atom(self) -> Value:
        token = self._next()
        for opening, closing in (("(", ")"), ("{", "}"), ("[", "]")):
            if token == opening:
                return self._bracketed(opening, closing)
        self._take()
        if token[0].isdigit() or token[0] == ".":
            return Fraction(token.rstrip(".") if token != "." else "")
        if token == "\\frac":
            above = self._argument()
            return _apply(above, self._argument(), "/")
        if token == "\\sqrt":
            degree = self._bracketed("[", "]") if self._next() == "[" else Fraction(2)
            return _root(self._argument(), degree)
        if token in _FUNCTIONS:
            return _FUNCTIONS[token](complex(self._argument()))
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        if token.isalpha() or re.fullmatch(r"\\[a-zA-Z]+", token) and token not in ("\\pm", "\\mp", "\\begin", "\\end"):
            # of no rule, so that no relation between names is one between values, and of both signs
            drawn = crc32(f"{token} {self._point}".encode())
            return Fraction(drawn % 9973 + 1, 97 if drawn & 1 else -89)
        raise _NotRead(token)


def _apply(a: Value, b: Value, sign: str) -> Value:
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        a, b = complex(a), complex(b)
        return a + b if sign == "+" else a * b if sign == "*" else a / b
    return a + b if sign == "+" else a * b if sign == "*" else a / b


def _raised(base: Value, power: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(power, Fraction) and power.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(power.numerator) <= _MOST_BITS:
            return base**power.numerator
    return complex(base) ** complex(power)


def _root(inside: Value, degree: Value) -> Value:
    if isinstance(inside, Fraction) and inside >= 0 and degree == 2:
        above, below = math.isqrt(inside.numerator), math.isqrt(inside.denominator)
        if above**2 == inside.numerator and below**2 == inside.denominator:
            return Fraction(above, below)
    if isinstance(inside, Fraction) and inside < 0 and degree == 3:
        return -_root(-inside, degree)
    return complex(inside) ** (1 / complex(degree))
