"""Axis sizes as polynomials over the symbols of a blueprint, and shapes made of them."""

from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

RUNTIME_SYMBOLS = ("N", "T", "H", "W")
BOUND_SYMBOLS = ("D", "C", "R")
SYMBOLS = RUNTIME_SYMBOLS + BOUND_SYMBOLS

Monomial = tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """The size of an axis: a polynomial with rational coefficients, such as `D/2` or `H + 2`.

    Attributes:
        terms: Pairs of a sorted product of symbols and its non-zero coefficient, sorted.
    """

    terms: tuple[tuple[Monomial, Fraction], ...]

    @staticmethod
    def of(value: int) -> "Size":
        """Returns a fixed size."""
        return _from_terms({(): Fraction(value)})

    @staticmethod
    def symbol(name: str) -> "Size":
        """Returns the size that a symbol stands for."""
        return _from_terms({(name,): Fraction(1)})

    @property
    def fixed(self) -> int | None:
        """The number of elements, or None where it depends on a symbol."""
        if not self.terms:
            return 0
        if len(self.terms) == 1 and self.terms[0][0] == () and self.terms[0][1].denominator == 1:
            return int(self.terms[0][1])
        return None

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols that the size depends on."""
        return frozenset(name for monomial, _ in self.terms for name in monomial)

    @property
    def runtime(self) -> bool:
        """Whether the size is known only when the graph runs."""
        return not self.symbols.isdisjoint(RUNTIME_SYMBOLS)

    @property
    def constant_term(self) -> Fraction:
        """The part of the size that depends on no symbol."""
        return self.coefficient(())

    def coefficient(self, monomial: Monomial) -> Fraction:
        """Returns the coefficient of a sorted product of symbols, 0 where it does not occur."""
        return dict(self.terms).get(monomial, Fraction(0))

    def bind(self, values: Mapping[str, int]) -> "Size":
        """Returns the size with some symbols replaced by numbers."""
        total = Size.of(0)
        for monomial, coefficient in self.terms:
            term = _from_terms({(): coefficient})
            for name in monomial:
                term = term * (Size.of(values[name]) if name in values else Size.symbol(name))
            total = total + term
        return total

    def __add__(self, other: "Size | int") -> "Size":
        terms = dict(self.terms)
        for monomial, coefficient in _lift(other).terms:
            terms[monomial] = terms.get(monomial, Fraction(0)) + coefficient
        return _from_terms(terms)

    def __mul__(self, other: "Size | int") -> "Size":
        terms: dict[Monomial, Fraction] = {}
        for left, left_coefficient in self.terms:
            for right, right_coefficient in _lift(other).terms:
                monomial = tuple(sorted(left + right))
                terms[monomial] = (
                    terms.get(monomial, Fraction(0)) + left_coefficient * right_coefficient
                )
        return _from_terms(terms)

    def divide(self, divisor: "Size") -> "Size | None":
        """Returns the exact quotient, or None where there is none for every value of the symbols.

        A fraction of D, C or R is a quotient, as its divisibility is checked once those are bound;
        a fraction of a size known only at run time is none.
        """
        if len(divisor.terms) != 1:
            return None
        divisor_monomial, divisor_coefficient = divisor.terms[0]
        terms: dict[Monomial, Fraction] = {}
        for monomial, coefficient in self.terms:
            remaining = list(monomial)
            for name in divisor_monomial:
                if name not in remaining:
                    return None
                remaining.remove(name)
            quotient = coefficient / divisor_coefficient
            bindable = bool(remaining) and set(remaining).isdisjoint(RUNTIME_SYMBOLS)
            if quotient.denominator != 1 and not bindable:
                return None
            terms[tuple(remaining)] = quotient
        return _from_terms(terms)

    def __str__(self) -> str:
        if not self.terms:
            return "0"
        parts = []
        for monomial, coefficient in sorted(self.terms, key=lambda term: (-len(term[0]), term[0])):
            text = "*".join(monomial)
            if not monomial:
                text = str(coefficient)
            elif coefficient.numerator != 1:
                text = f"{coefficient.numerator}*{text}"
            if monomial and coefficient.denominator != 1:
                text = f"{text}/{coefficient.denominator}"
            parts.append(text)
        return "+".join(parts).replace("+-", "-")


Shape = tuple[Size, ...]


def product(sizes: Iterable[Size]) -> Size:
    """Returns the number of elements of a shape."""
    total = Size.of(1)
    for size in sizes:
        total = total * size
    return total


def format_shape(shape: Shape) -> str:
    """Returns a shape for people, such as `[N, D]`."""
    return "[" + ", ".join(str(size) for size in shape) + "]"


def _lift(value: Size | int) -> Size:
    return value if isinstance(value, Size) else Size.of(value)


def _from_terms(terms: Mapping[Monomial, Fraction]) -> Size:
    return Size(tuple(sorted((m, c) for m, c in terms.items() if c != 0)))
