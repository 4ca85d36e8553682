"""Symbolic sizes agree with the numbers that they stand for."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints.sizes import SYMBOLS
from esper.blueprints.sizes import Size

LEAVES = st.one_of(st.integers(0, 9).map(Size.of), st.sampled_from(SYMBOLS).map(Size.symbol))
SIZES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] * pair[1]),
    ),
    max_leaves=6,
)
VALUES = st.fixed_dictionaries({name: st.integers(1, 7) for name in SYMBOLS})


def number(size: Size, values: dict[str, int]) -> int:
    fixed = size.bind(values).fixed
    assert fixed is not None
    return fixed


@given(SIZES, SIZES, VALUES)
def test_arithmetic(left: Size, right: Size, values: dict[str, int]) -> None:
    a, b = number(left, values), number(right, values)
    assert number(left + right, values) == a + b
    assert number(left * right, values) == a * b
    assert left + right == right + left
    assert left * (right + 1) == left * right + left


@given(SIZES, st.sampled_from(SYMBOLS), st.integers(1, 6), VALUES)
def test_division_undoes_multiplication(
    size: Size, symbol: str, factor: int, values: dict[str, int]
) -> None:
    divisor = Size.symbol(symbol) * factor
    assert (size * divisor).divide(divisor) == size


@pytest.mark.parametrize(
    ("size", "divisor", "quotient"),
    [
        (Size.of(6), Size.of(3), "2"),
        (Size.of(7), Size.of(2), None),
        (Size.symbol("D"), Size.of(2), "D/2"),
        (Size.symbol("D") * 3, Size.of(2), "3*D/2"),
        (Size.symbol("H"), Size.of(2), None),
        (Size.symbol("D"), Size.symbol("C"), None),
        (Size.symbol("D") + 1, Size.of(2), None),
        (Size.symbol("H") + 2, Size.symbol("H") + 2, None),
        (Size.symbol("D") * Size.symbol("H"), Size.symbol("H"), "D"),
    ],
)
def test_division_is_exact_or_refused(size: Size, divisor: Size, quotient: str | None) -> None:
    result = size.divide(divisor)
    assert (None if result is None else str(result)) == quotient


def test_text_and_facts() -> None:
    size = Size.symbol("H") * 2 + Size.symbol("D") * Size.symbol("N") + -3
    assert str(size) == "D*N+2*H-3"
    assert size.fixed is None and size.runtime
    assert size.symbols == {"H", "D", "N"}
    assert size.coefficient(("D", "N")) == Fraction(1)
    assert size.constant_term == -3
    assert str(Size.of(0)) == "0"
    assert not Size.symbol("D").runtime
