"""Means of a few runs with their confidence intervals, for the tables of the benchmarks."""

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev

T_95 = {
    2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 11: 2.23,
    12: 2.20, 13: 2.18, 14: 2.16, 15: 2.14, 16: 2.13, 20: 2.09, 30: 2.05,
}  # fmt: skip
"""Student's t, two-sided, by the number of runs."""


def t_95(runs: int) -> float:
    """The factor for so many runs, at least two; between two of the table, the larger one."""
    return T_95[max(known for known in T_95 if known <= runs)]


def cell(values: Sequence[float], form: str) -> str:
    """The mean ± half the width of its 95 % confidence interval; of one value, just that."""
    if len(values) < 2:
        return format(values[0], form)
    half = t_95(len(values)) * stdev(values) / sqrt(len(values))
    return f"{mean(values):{form}} ± {half:{form}}"


def paired(differences: Sequence[float], form: str) -> str:
    """The mean of differences taken pair by pair ± half the width of its 95 % interval."""
    if len(differences) < 2:
        return format(differences[0], form)
    half = t_95(len(differences)) * stdev(differences) / sqrt(len(differences))
    return f"{mean(differences):{form}} ± {half:{form.lstrip('+')}}"
