import pytest
from hypothesis import given
from hypothesis import strategies as st

from casallm.errors import ConfigError
from casallm.units import (
    format_bytes,
    format_count,
    format_duration,
    format_usd,
    parse_bytes,
    parse_count,
    parse_hours,
    parse_usd,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1.2B", 1_200_000_000), ("350m", 350_000_000), ("10_000", 10_000), ("3e8", 300_000_000)],
)
def test_counts_are_read_as_people_write_them(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["-3", "0", "1.2Q", "", "big", "1e400"])
def test_what_is_no_count_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"350M|1\.2B|K, M, B or T"):
        parse_count(text, what="params")


def test_an_unknown_multiplier_is_named():
    with pytest.raises(ConfigError) as caught:
        parse_count("1.2Q", what="params")

    assert str(caught.value) == (
        "params '1.2Q' ends in 'Q', which is no multiplier: use K, M, B or T, as in 1.2B"
    )


def test_a_number_that_lacks_its_multiplier_gets_one():
    with pytest.raises(ConfigError, match=r"is 1\.2, which is no whole number: did you mean 1\.2B"):
        parse_count("1.2", what="params")


def test_a_decimal_comma_is_not_taken_for_thousands():
    with pytest.raises(ConfigError, match=r"has a comma for a decimal point: write it as 1\.2B"):
        parse_count("1,2B", what="params")
    assert parse_count("1,200,000") == 1_200_000
    assert parse_usd("$1,500.50") == 1500.5


@given(st.integers(1, 10**15))
def test_a_formatted_count_is_within_half_a_percent_of_itself(count):
    assert parse_count(format_count(count)) == pytest.approx(count, rel=0.006)


def test_bytes_hours_and_dollars_are_read():
    assert parse_bytes("1.5 GB") == 1_500_000_000
    assert parse_bytes("4GiB") == 4 * 2**30
    assert parse_hours("90min") == 1.5
    assert parse_hours("2d") == 48
    assert parse_usd("$1,500.50") == 1500.5


def test_amounts_print_as_they_read():
    assert format_count(344_180_736) == "344M"
    assert format_count(999_950) == "1M"
    assert format_bytes(4_130_000_000) == "4.13 GB"
    assert format_duration(5) == "5s"
    assert format_duration(750) == "12m30s"
    assert format_duration(11_100) == "3h05m"
    assert format_duration(2 * 86_400 + 4 * 3600) == "2d04h"
    assert format_duration(float("inf")) == "?"
    assert format_usd(0.042) == "$0.042"
    assert format_usd(6.3) == "$6.30"
    assert format_usd(1017.4) == "$1,017"
