"""How late a loop was, as the benchmarks tell it."""

import pytest

from benchmarks.traffic.lag import Lag


def test_a_stall_counts_as_all_the_looks_it_lasted() -> None:
    lag = Lag()
    for _ in range(950):
        lag.note(-0.001)
    assert lag.p99 == 0.0
    lag.note(1.0)  # fifty looks were due meanwhile
    assert lag.p99 == pytest.approx(0.8, abs=0.02)


def test_a_look_that_is_a_little_late_is_one_look() -> None:
    lag = Lag()
    for _ in range(98):
        lag.note(0.0)
    lag.note(0.019)
    lag.note(0.019)
    assert lag.p99 == pytest.approx(0.019)
