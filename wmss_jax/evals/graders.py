"""Graders: is this generated text the right answer? (prediction, gold) -> bool, never an exception.

To add one: write the function, add a row to GRADERS. Text is read as ASCII arithmetic: a decimal
point is a point, commas separate thousands, signs of currency and percent say nothing.
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence

Grader = Callable[[str, str], bool]

RELATIVE_TOLERANCE = 1e-4  # of numbers that are not whole: 0.33333 is 1/3, but 20001 is not 20000
MAX_EXPRESSION = 200  # characters; longer ones could exhaust Python's parser
MAX_DEPTH = 100  # of nested operations

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+"
# A sign only where there is nothing that it could subtract from: "10-3" and "10 -3" end in 3.
_SIGN = r"(?<![\w)\]}%])(?<![0-9)\]}%][ ])([-+])"
_NUMBER = re.compile(
    rf"""
    (?:{_SIGN})? (?:\\?[$€£¥][ ]?)? (?:{_SIGN})?   # -5, -$5, $-5
    (?<![\w^])(?<![\^_]\{{)                        # no part of a word, an exponent or an index
    (?:([0-9]+)[ ](?=[0-9]+[ ]?/[ ]?[0-9]))?       # 2 1/2
    ({_DIGITS})
    (?:[ ]?/[ ]?({_DIGITS}))?
    """,
    re.VERBOSE | re.ASCII,
)
_HASHES = re.compile(r"####(?=[-+*\\$€£¥. ]{0,8}[0-9])")  # and no heading of that level
_PHRASE = re.compile(r"\banswer\W{0,3}(?:is\b|[:=])\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n")
_UNKNOWN = re.compile(r"\s*[A-Za-z?]\s*")
_ARITHMETIC = re.compile(r"[0-9.+\-*/() \t]+")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NO_LETTER = re.compile(r"\\text(?:bf)?(?![a-z])|\W")
_CHOSEN, _NAMED = (
    re.compile(rf"\b(?i:{word})\b[^\w(]{{0,4}}(?:is|are|:|=)?[^\w(]{{0,6}}(?i:option|choice)?\s*\(?([A-J])\b(?!['’])")
    for word in ("answer", "option|choice")
)
_BRACKETED = re.compile(r"\(([A-J])\)")
_CHOICE_LABEL = re.compile(r"\A\s*\(?[A-J]\s*[).:]\s*")
_CODE = re.compile(r"```(?:[Pp]ython3?|py)?[^\S\n]*\n(.*?)(?:\n```|\Z)", re.DOTALL)

_CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "‐": "-", "×": "*", "·": "*", "÷": "/", "⁄": "/", "∕": "/", "≈": "=",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "\u00a0": " ", "\u202f": " ",
})  # fmt: skip
_REWRITTEN = (
    (re.compile(r"(?<=[0-9])(?=[½¼¾⅓⅔]|\\[dt]?frac)"), " "),  # 2½ is 2 1/2, not 21/2
    (re.compile(r"\\[dt]?frac\s?\{\s?(-?[0-9.]+)\s?\}\s?\{\s?([0-9.]+)\s?\}"), r"\1/\2"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!]|[\u00a0\u202f])(?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"\\times|\\cdot"), "*"),
    (re.compile(r"\\div"), "/"),
)
_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip


def exact(prediction: str, gold: str) -> bool:
    """Return whether the texts are equal but for white space.

    >>> exact(" yes,  it is\\n", "yes, it is"), exact("Yes", "yes")
    (True, False)
    """
    return prediction.split() == gold.split()


def numeric(prediction: str, gold: str) -> bool:
    """Return whether the prediction's answer is gold's number.

    The answer is what the prediction marks as such (`\\boxed{18}`, `#### 18`, "the answer is 18",
    the last of each), else its last number. Gold's number is marked alike, else its first after the
    last "=". Both may be fractions, also mixed and in LaTeX.

    >>> numeric("5 + 7 is 12. The answer is 12 (not 11).", "12 (marbles)")
    True
    >>> numeric("So 3/4 of $1,600, that is $1200.00", "#### 1,200"), numeric("12 or 13", "12")
    (True, False)
    """
    return _same(_answer_number(prediction), _gold_number(gold))


def equation(prediction: str, gold: str) -> bool:
    """Return whether the prediction is arithmetic with gold's value.

    The whole prediction is an expression of + - * / and brackets, or an equation whose sides agree;
    one side may be a single unknown, a letter or "?", which then has the value of the others.
    Gold is the same, or text with a number as for `numeric`.

    >>> equation("X=(27.0-6.0)/7.0", "3"), equation("139+113=x", "252"), equation("5+7", "5+7=12")
    (True, True, True)
    >>> equation("5+7=13", "12"), equation("x=1/0", "0"), equation("It is 12", "12")
    (False, False, False)
    """
    wanted = _equation_value(gold)
    return _same(_equation_value(prediction), _gold_number(gold) if math.isnan(wanted) else wanted)


def letter(prediction: str, gold: str) -> bool:
    """Return whether the prediction chooses gold: a letter, or the number of an option counted from 0.

    >>> letter("B is tempting. The answer is (C).", "C"), letter(r"\\boxed{c}", "2"), letter("A or B", "C")
    (True, True, False)
    """
    wanted = gold.strip().strip("().").upper()
    if re.fullmatch("1?[0-9]", wanted, re.ASCII):
        wanted = _LETTERS[int(wanted)]
    return bool(wanted) and chosen(prediction) == wanted


GRADERS: dict[str, Grader] = {"exact": exact, "numeric": numeric, "equation": equation, "letter": letter}


# -- the answer in a text ----------------------------------------------------------------------------------------------


def number(text: str) -> str:
    """Return the number that `numeric` takes for a text's answer, written in one way; empty if there is none."""
    value = _answer_number(text)
    return "" if math.isnan(value) else f"{value:.12g}"


def chosen(text: str, choices: Sequence[str] = ()) -> str:
    """Return the letter of the option that a text chooses; empty if it chooses none.

    That is the last boxed letter, else the letter behind the last "answer is", else "option" or "choice", else one that
    is all of the text or stands in brackets last; else, of the `choices`' texts, the one that is boxed.

    >>> chosen("So the answer is B."), chosen("(A) or (D)"), chosen(r"\\boxed{ 7 }", ["A) 5", "B) 7"]), chosen("A dog")
    ('B', 'D', 'B', '')
    """
    boxed = _boxed(text)
    for found in (_lone(boxed), *(p.findall(text) for p in (_CHOSEN, _NAMED)), _lone(text), _BRACKETED.findall(text)):
        if found:
            return found[-1].upper()
    wanted = _bare(boxed)
    same = [index for index, choice in enumerate(choices) if wanted and _bare(_CHOICE_LABEL.sub("", choice)) == wanted]
    return _LETTERS[same[0]] if len(same) == 1 else ""


def final(text: str) -> str:
    """Return what a text says when it has done with thinking: what its last <answer> holds, else follows </think>."""
    text = text.rpartition("</think>")[2]
    before, found, answer = text.rpartition("<answer>")
    return answer.partition("</answer>")[0] if found else before + answer


def code(text: str) -> str:
    """Return the program in a text: the last block between ``` marks, or all of a text that has none."""
    blocks = _CODE.findall(text)
    return blocks[-1] if blocks else text


def _same(a: float, b: float) -> bool:
    """Return whether two numbers are equal, or nearly so where one is not whole; NaN never is."""
    if a.is_integer() and b.is_integer():
        return a == b
    return abs(a - b) <= RELATIVE_TOLERANCE * abs(b)


# -- numbers in text ---------------------------------------------------------------------------


def _plain(text: str) -> str:
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return text.translate(_CHARACTERS)


def _answer_number(prediction: str) -> float:
    text = _plain(prediction)
    answer = _marked_number(text)
    if answer is None:
        *_, answer = [math.nan, *map(_value, _NUMBER.finditer(text))]
    return answer


def _gold_number(gold: str) -> float:
    text = _plain(gold)
    for number in (_marked_number(text), _first_number(text)):
        if number is not None:
            return number
    return math.nan


def _marked_number(text: str) -> float | None:
    """Return the number that the text itself marks as its answer."""
    for marked in (_boxed(text), _after_last(_HASHES, text), _after_last(_PHRASE, text)):
        number = _first_number(marked)
        if number is not None:
            return number
    return None


def _lone(text: str) -> str:
    """Return the letter that is all of a text."""
    bare = _NO_LETTER.sub("", text[:40]) if len(text) <= 40 else ""
    return bare if len(bare) == 1 and bare.upper() in "ABCDEFGHIJ" else ""


def _bare(text: str) -> str:
    """Return a text without what says nothing about an option: white space, dollar signs, case."""
    return re.sub(r"[\s$]|\\[,!;]", "", text).lower()


def _boxed(text: str) -> str:
    """Return what the last \\boxed{...} holds, nested braces included."""
    _, found, rest = text.rpartition(r"\boxed{")
    depth = 1
    for index, character in enumerate(rest if found else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:index]
    return rest if found else ""


def _after_last(marker: re.Pattern, text: str) -> str:
    """Return the sentence that follows the last match of `marker`."""
    *_, match = [None, *marker.finditer(text)]
    return "" if match is None else _SENTENCE_END.split(text[match.end() :], maxsplit=1)[0]


def _first_number(text: str) -> float | None:
    """Return the first number after the last "=", else the first of all."""
    match = _NUMBER.search(text.rpartition("=")[2]) or _NUMBER.search(text)
    return None if match is None else _value(match)


def _value(match: re.Match) -> float:
    sign, inner_sign, whole, number, denominator = match.groups()
    value = _float(number)
    if denominator is not None:
        value = value / _float(denominator) if _float(denominator) else math.nan
    value += _float(whole or "0")
    return -value if "-" in (sign, inner_sign) else value


def _float(digits: str) -> float:
    return float(digits.replace(",", ""))


# -- arithmetic --------------------------------------------------------------------------------


def _equation_value(text: str) -> float:
    """Return the common value of an equation's sides, or of a lone expression; else NaN."""
    if len(text) > MAX_EXPRESSION:
        return math.nan
    sides = _plain(text).strip().split("=")
    unknown = next((side for side in sides if _UNKNOWN.fullmatch(side)), None)
    if unknown is not None:
        sides.remove(unknown)
    values = [_arithmetic_value(side) for side in sides] or [math.nan]
    return values[0] if all(_same(value, values[0]) for value in values) else math.nan


def _arithmetic_value(text: str) -> float:
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))|\\?[$€£¥]", "", text).strip()
    text = re.sub(r"(?<![0-9.])0+(?=[0-9])", "", text)  # Python refuses 007
    # Nothing but these characters reaches the parser: no names, calls, strings or attributes.
    if not _ARITHMETIC.fullmatch(text):
        return math.nan
    try:
        return _node_value(ast.parse(text, mode="eval").body, MAX_DEPTH)
    except (SyntaxError, ValueError, MemoryError, RecursionError, ZeroDivisionError, OverflowError):
        return math.nan


def _node_value(node: ast.AST, depth: int) -> float:
    if depth == 0:
        return math.nan
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_node_value(operand, depth - 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_node_value(left, depth - 1), _node_value(right, depth - 1))
    return math.nan
