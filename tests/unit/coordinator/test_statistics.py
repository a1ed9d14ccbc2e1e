"""Numbers over time: adding up, percentiles, and the tiers they are rolled up into."""

import random
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator.db import Status
from ollama_coordinator.journal import TIERS, Bucket, Series, SeriesRow
from ollama_coordinator.journal.statistics import merge, percentile, point, tier_for
from support.past import past

NOW = datetime(2026, 1, 31, tzinfo=UTC)


def filled(seconds: list[float]) -> Bucket:
    """A bucket of requests with these times to first token."""
    bucket = Bucket()
    for value in seconds:
        bucket.count(past(0, first_token_seconds=value))
    return bucket


@pytest.mark.spec("DASH-13")
def test_percentiles_are_right_to_a_tenth() -> None:
    draws = random.Random(1)
    seconds = [draws.lognormvariate(0, 1) for _ in range(2000)]
    histogram = filled(seconds).first_token
    for share in (0.5, 0.95):
        exact = sorted(seconds)[int(share * len(seconds))]
        told = percentile(histogram, share)
        assert told is not None
        assert abs(told - exact) / exact < 0.1
    assert percentile({}, 0.5) is None


@pytest.mark.spec("DASH-14")
@given(st.lists(st.lists(st.floats(0, 1000), max_size=5), max_size=5))
def test_buckets_add_up_in_any_grouping(groups: list[list[float]]) -> None:
    whole = filled([value for group in groups for value in group])
    together = Bucket()
    for group in groups:
        together.add(msgspec.json.decode(msgspec.json.encode(filled(group)), type=Bucket))
    assert together == whole


def test_a_bucket_counts_results_apart() -> None:
    bucket = Bucket()
    for status in Status:
        bucket.count(past(0, status=status, first_token_seconds=None))
    told = point(bucket, NOW, 60)
    assert (told.requests, told.failed, told.refused, told.cancelled) == (4, 1, 1, 1)
    assert told.first_token_p50 is None


def test_tokens_that_were_counted_too_early_are_not_shown_as_negative() -> None:
    assert point(Bucket(output_tokens=-3), NOW, 10).tokens_per_second == 0


@pytest.mark.spec("DASH-14")
def test_a_moment_belongs_to_one_bucket_of_each_tier() -> None:
    series = Series()
    for at in (1000.0, 1009.9, 1010.0, 1859.0):
        series.fresh("").requests += 1
        series.fold(at)
    rows = series.take_changed(fleet_only=True)
    assert {(row.tier, row.start): row.bucket.requests for row in rows} == {
        (10, 1000): 2, (10, 1010): 1, (10, 1850): 1,
        (60, 960): 3, (60, 1800): 1,
        (900, 900): 3, (900, 1800): 1,
    }  # fmt: skip
    assert series.take_changed(fleet_only=True) == []
    series.fresh("agent").requests += 1
    series.fold(1000)
    assert series.take_changed(fleet_only=True) == []
    assert len(series.take_changed(fleet_only=False)) == len(TIERS) - 1


@pytest.mark.spec("DASH-14")
def test_a_restarted_series_goes_on_filling() -> None:
    series = Series()
    series.restore([SeriesRow(60, 960, "", Bucket(requests=5))])
    series.fresh("").requests += 1
    series.fold(1000)
    (row,) = [row for row in series.take_changed(fleet_only=True) if row.tier == 60]
    assert row.bucket.requests == 6


def test_rows_that_could_not_be_written_come_again_unless_newer_ones_did() -> None:
    series = Series()
    series.fresh("").requests += 1
    series.fold(1000)
    taken = series.take_changed(fleet_only=True)
    series.put_back(taken)
    assert series.take_changed(fleet_only=True) == taken


@pytest.mark.spec("DASH-13")
def test_a_chart_reads_few_rows() -> None:
    for minutes in (1, 15, 60, 360, 1440, 10_080, 44_640):
        seconds = minutes * 60
        tier = tier_for(seconds)
        assert tier.keep_seconds >= seconds
        assert seconds / tier.seconds <= 3000


def test_empty_stretches_are_points_too() -> None:
    rows = [SeriesRow(60, 120, "", Bucket(requests=1)), SeriesRow(60, 180, "", Bucket(requests=2))]
    merged = merge(rows, 120, 0, 400)
    assert {start: bucket.requests for start, bucket in merged.items()} == {
        0: 0, 120: 3, 240: 0, 360: 0,
    }  # fmt: skip
