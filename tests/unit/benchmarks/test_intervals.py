"""What the benchmarks' tables say of how sure their means are."""

import pytest

from benchmarks.intervals import cell, t_95


@pytest.mark.parametrize(
    ("runs", "factor"), [(2, 12.71), (10, 2.26), (11, 2.23), (19, 2.13), (20, 2.09), (100, 2.05)]
)
def test_the_factor_is_never_less_than_that_of_so_many_runs(runs: int, factor: float) -> None:
    assert t_95(runs) == factor


def test_a_cell_is_the_mean_and_half_its_interval() -> None:
    assert cell([1.0], ".2f") == "1.00"
    assert cell([1.0, 2.0, 3.0], ".2f") == "2.00 ± 2.48"
