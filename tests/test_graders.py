"""Graders against answers right and wrong, and against anything at all."""

import doctest
import math
import time

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from wmss_jax.evals import graders
from wmss_jax.evals.graders import GRADERS, equation, exact, numeric

RIGHT, WRONG = True, False

NUMERIC = [
    # the last number
    ("12", "12", RIGHT),
    ("She has 12 marbles.", "12 (marbles)", RIGHT),
    ("5 + 7 = 12", "5+7=12", RIGHT),
    ("5 + 7 = 13", "5+7=12", WRONG),
    ("12 or 13", "12", WRONG),
    ("", "12", WRONG),
    ("I do not know.", "12", WRONG),
    ("12", "", WRONG),
    ("", "", WRONG),
    ("no number", "none either", WRONG),
    # whole numbers are not rounded, others are
    ("20001", "20000", WRONG),
    ("1000000.4", "1000000", RIGHT),
    ("0.3333", "1/3", RIGHT),
    ("0.33333", "0.333", WRONG),
    ("0.33", "1/3", WRONG),
    ("12.0", "12", RIGHT),
    ("12.00", "12.0 (dollars)", RIGHT),
    ("0", "0", RIGHT),
    ("-0.0", "0", RIGHT),
    ("0.00001", "0", WRONG),
    # signs, also where they are none
    ("-5", "-5", RIGHT),
    ("−5", "-5", RIGHT),
    ("5", "-5", WRONG),
    ("The change is -$5.", "-5", RIGHT),
    ("The change is $-5.", "-5", RIGHT),
    ("10-3", "3", RIGHT),
    ("10 -3", "3", RIGHT),
    ("(10)-3", "3", RIGHT),
    ("between 3-5", "5", RIGHT),
    ("+7", "7", RIGHT),
    ("- 7 apples", "7", RIGHT),
    # thousands, decimals, currency, percent
    ("1,234", "1234", RIGHT),
    ("1,234,567.89", "1234567.89", RIGHT),
    ("$1,200.50", "1200.5", RIGHT),
    (r"\$1,200.50", "1200.5", RIGHT),
    ("€ 40", "40", RIGHT),
    ("Rs.12", "12", RIGHT),
    ("1, 2, 3", "3", RIGHT),
    ("1,2,3", "123", WRONG),
    ("1{,}234", "1234", RIGHT),
    ("1\u202f234", "1234", RIGHT),
    (".5", "0.5", RIGHT),
    ("It costs 5.", "5", RIGHT),
    ("1e3", "1000", RIGHT),
    ("25%", "25", RIGHT),
    (r"25\%", "25", RIGHT),
    ("25%", "0.25", WRONG),
    # fractions
    ("3/4", "0.75", RIGHT),
    ("3 / 4", "0.75", RIGHT),
    ("0.75", "3/4", RIGHT),
    ("2 1/2", "2.5", RIGHT),
    ("2½", "2.5", RIGHT),
    ("-½", "-0.5", RIGHT),
    (r"\frac{1}{2}", "0.5", RIGHT),
    (r"-\frac{1}{2}", "-1/2", RIGHT),
    (r"2\dfrac{1}{2} cups", "2.5", RIGHT),
    ("-2 1/2", "-2.5", RIGHT),
    ("5/0", "5", WRONG),
    ("0/0", "0/0", WRONG),
    ("$10/hour", "10", RIGHT),
    # digits that are no answer
    ("12 cm^2", "12", RIGHT),
    (r"12 \text{ cm}^{2}", "12", RIGHT),
    ("12 litres of H2O", "12", RIGHT),
    ("12 = x_1", "12", RIGHT),
    # the marked answer comes first
    ("#### 18", "18", RIGHT),
    ("It is 18.\n#### 18\nThat took 3 steps.", "#### 18", RIGHT),
    ("#### $1,800", "1800", RIGHT),
    ("#### Answer\n18", "18", RIGHT),
    ("#### Step 3: the sum\nIt is 18", "18", RIGHT),
    ("#### **18** from 3 bags", "18", RIGHT),
    ("#### 17", "It is 18\n#### 18", WRONG),
    (r"\boxed{12}, since 5 + 8 is 13", "12", RIGHT),
    (r"\boxed{5} no, \boxed{12}", "12", RIGHT),
    (r"\boxed{\frac{1}{2}}", "0.5", RIGHT),
    (r"\boxed{12\text{ cm}^2}", "12", RIGHT),
    (r"\boxed{x = 12}", "12", RIGHT),
    (r"\boxed{12", "12", RIGHT),
    (r"\boxed{}12", "12", RIGHT),
    ("The answer is 12. Check: 12 - 7 = 5", "12", RIGHT),
    ("The answer is 5 + 7 = 12 marbles", "12", RIGHT),
    ("The answer is 12 (2 bags of 6).", "12", RIGHT),
    ("**Answer:** 12\nThat is 5 + 7 and not 13", "12", RIGHT),
    ("**Answer**: 12, from 2 bags", "12", RIGHT),
    ("ANSWER: $5.50, not 6", "5.5", RIGHT),
    ("The answer is 11. No, the answer is 12, not 11", "12", RIGHT),
    ("The answer is unclear, perhaps 12", "12", RIGHT),
    ("To answer this, note 45 is too many; so 30", "30", RIGHT),
    ("The answer is 13", "12", WRONG),
    # gold's number
    ("12", "12 (2-packs of marbles)", RIGHT),
    ("2", "12 (2-packs of marbles)", WRONG),
    ("12", "x = 12", RIGHT),
    ("3.0", "3.0", RIGHT),
    ("15", "248/16=15 r8", RIGHT),
]

EQUATION = [
    ("X=(27.0-6.0)/7.0", "3.0", RIGHT),
    ("X=((27.0-6.0)/7.0)", "3", RIGHT),
    ("139+113=x", "252", RIGHT),
    ("5+7=12", "12 (marbles)", RIGHT),
    ("5+7=12", "5+7=12", RIGHT),
    ("7 + 5", "5+7=12", RIGHT),
    ("( 406.0 - 132.0 )", "274.0", RIGHT),
    ("( 406.0 - 132.0 )", "X=(132.0+142.0)", RIGHT),
    (" \n5+7=?\n", "12", RIGHT),
    ("x=5+7=12", "12", RIGHT),
    ("12", "12", RIGHT),
    ("x=12", "12", RIGHT),
    ("-3*-4", "12", RIGHT),
    ("--12", "12", RIGHT),
    ("6×2", "12", RIGHT),
    ("24÷2", "12", RIGHT),
    (r"6 \times 2", "12", RIGHT),
    (r"\frac{24}{2} = x", "12", RIGHT),
    ("$5+$7", "12", RIGHT),
    ("1,200+34", "1,234", RIGHT),
    ("05+007", "12", RIGHT),
    (".5*24", "12", RIGHT),
    ("4.35*100", "435", RIGHT),
    ("1/3", "0.33333", RIGHT),
    ("10/3=3.3333", "10/3", RIGHT),
    ("+".join(["1"] * 99), "99", RIGHT),
    # another value, or none
    ("X=(27.0-6.0)/8.0", "3.0", WRONG),
    ("7-5", "12", WRONG),
    ("5+7=13", "13", WRONG),
    ("5+7=13", "12", WRONG),
    ("x=1/0", "0", WRONG),
    ("0/0", "0/0", WRONG),
    ("1/(2-2)", "1", WRONG),
    ("x=y", "12", WRONG),
    ("x=12=y", "12", WRONG),
    ("2*x=24", "12", WRONG),
    ("x", "12", WRONG),
    ("x=", "12", WRONG),
    ("=12", "12", WRONG),
    ("5+7==12", "12", WRONG),
    ("5+", "5", WRONG),
    ("", "12", WRONG),
    ("", "", WRONG),
    ("(5+7", "12", WRONG),
    ("5+7)", "12", WRONG),
    ("5 7", "57", WRONG),
    ("2**3", "8", WRONG),
    ("25//2", "12", WRONG),
    ("25%13", "12", WRONG),
    ("3(4)", "12", WRONG),
    ("6*2 apples", "12", WRONG),
    ("It is 12", "12", WRONG),
    ("5+7\n12", "12", WRONG),
    ("...", "0", WRONG),
    ("()", "0", WRONG),
    ("1e1+2", "12", WRONG),
    ("0xC", "12", WRONG),
    ("1_2", "12", WRONG),
    ("12j", "12", WRONG),
    ("True+11", "12", WRONG),
    ("'12'", "12", WRONG),
    ("int('12')", "12", WRONG),
    ("().__class__", "12", WRONG),
    ("__import__('os').system('true')", "0", WRONG),
    ("12#", "12", WRONG),
    ("-" * 150 + "12", "12", WRONG),
    ("(" * 90 + "12" + ")" * 90, "12", RIGHT),
    ("+".join(["1"] * 101), "101", WRONG),
    ("9" * 190 + "*" + "9" * 5000, "1", WRONG),
    ("12" + " " * 500, "12", WRONG),
    ("5+7=12", "no number", WRONG),
]

EXACT = [
    ("yes", "yes", RIGHT),
    (" yes,\n it  is ", "yes, it is", RIGHT),
    ("", " ", RIGHT),
    ("Yes", "yes", WRONG),
    ("yesno", "yes no", WRONG),
    ("12.0", "12", WRONG),
]


def pairs(rows):
    return pytest.mark.parametrize(("prediction", "gold", "verdict"), rows)


@pairs(NUMERIC)
def test_numeric(prediction, gold, verdict):
    assert numeric(prediction, gold) is verdict


@pairs(EQUATION)
def test_equation(prediction, gold, verdict):
    assert equation(prediction, gold) is verdict


@pairs(EXACT)
def test_exact(prediction, gold, verdict):
    assert exact(prediction, gold) is verdict


def test_docstring_examples():
    results = doctest.testmod(graders)
    assert results.attempted >= 5 and results.failed == 0


# Pieces that the patterns look for, so that random texts get past the first check.
pieces = st.sampled_from(
    [
        *"0123456789.,+-*/()=%$^_{} \\\n?xX½−×",
        "12",
        "#### ",
        r"\boxed{",
        r"\frac{",
        "answer is ",
        "1e9",
    ]
)
texts = st.one_of(st.text(), st.lists(pieces, max_size=60).map("".join))


@pytest.mark.parametrize("name", GRADERS)
@given(prediction=texts, gold=texts)
@example("٣+٤", "7")
@example("\x00", "\ud800")
@example("1e999", "1e999")
@settings(max_examples=500, deadline=None)
def test_a_grader_answers_any_text(name, prediction, gold):
    assert GRADERS[name](prediction, gold) in (True, False)


two_places = st.decimals(min_value="-1e9", max_value="1e9", places=2)


@pytest.mark.parametrize("name", ["numeric", "equation"])
@given(value=two_places, off=st.decimals("-9", "9", places=1))
@settings(max_examples=300, deadline=None)
def test_a_number_equals_itself_and_what_is_nearly_it(name, value, off):
    grader, other = GRADERS[name], value + off
    assert grader(f"{value:,}", f"{value}") and grader(f"{value}", f"{float(value)!r}")
    whole = value == int(value) and other == int(other)
    share = float(abs(off) / abs(value)) if value else math.inf
    assume(abs(share - graders.RELATIVE_TOLERANCE) > 1e-9)  # where rounding decides
    near = off == 0 or (not whole and share < graders.RELATIVE_TOLERANCE)
    assert grader(f"{other}", f"{value}") is near


PIECES = [
    "9", "1,111", ",111", "1 ", "1/", "####", "#### 1", "answer", "answer is ",
    r"\boxed{", r"\frac{", "((", "=", "-", "{",
]  # fmt: skip


@pytest.mark.parametrize("name", GRADERS)
@pytest.mark.parametrize("piece", PIECES)
def test_long_texts_are_graded_at_once(name, piece):
    """No pattern goes over the whole text again and again: 100,000 characters take milliseconds."""
    start = time.process_time()
    GRADERS[name](piece * (100_000 // len(piece)), "12")
    assert time.process_time() - start < 2.0
