"""Figures as they are written in tables, sentences and the page."""

import math
from typing import TypeGuard

MARKED = "* had a part in training: filtered the pairs, or counts words that rows were made of"


def is_number(value: object) -> TypeGuard[float]:
    """Whether a figure is there and finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: object) -> str:
    """A figure short enough for a table: 0.034, 0.24, 12.1, 1,234; a dash where there is none."""
    if not is_number(value):
        return "–"
    digits = _digits(abs(value))
    text = f"{abs(value):.0e}" if digits is None else f"{abs(value):,.{digits}f}"
    return f"−{text}" if value < 0 else text


def bound(value: object) -> str:
    """An upper bound, rounded up: what was shown to be below 0.194 is below 0.20, not below 0.19."""
    if not is_number(value) or value < 0 or (digits := _digits(value)) is None:
        return number(value)
    return number(math.ceil(value * 10**digits - 1e-9) / 10**digits)


def _digits(size: float) -> int | None:
    """Decimal places of a figure of that size; None where it is too small for any."""
    if size < 0.1:
        return 2 if size == 0 else 3 if size >= 0.0005 else 4 if size >= 0.00005 else None
    return 2 if size < 9.995 else 1 if size < 99.95 else 0


def signed(value: object) -> str:
    """A difference with its sign always written."""
    text = number(value)
    return f"+{text}" if is_number(value) and value > 0 else text


def percent(share: float) -> str:
    """A level for a reader: 95 %, 99.9 %."""
    return f"{100 * share:.6g} %"


def p_text(value: object) -> str:
    """A p-value as it is written in a paper; empty where there is none."""
    if not is_number(value):
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def arrow(delta: float | None) -> str:
    """The direction of a difference, for readers without the colours."""
    return "" if delta is None else "▲" if delta > 0 else "▼" if delta < 0 else "="


def listed(words: list[str]) -> str:
    """A list in a sentence: a, b and c."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
