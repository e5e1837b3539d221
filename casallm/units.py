"""Counts, bytes, times and dollars, parsed from what people type and printed as they read.

"1.2B" is 1,200,000,000; "10G" is ten billion tokens or bytes (powers of ten, as drives and
clouds bill); "24h" is a duration; "$1,017" is money. Parsing raises ConfigError with the
nearest thing that would have been understood.
"""

import math
import re

from casallm.errors import ConfigError

_COUNT = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SECONDS = {"S": 1.0, "M": 60.0, "MIN": 60.0, "H": 3600.0, "D": 86400.0}
MOST_USD, MOST_HOURS = 1e12, 876_600.0
"""Beyond which an amount or a duration is a slip of the keyboard."""

_NUMBER = re.compile(r"\s*([-+]?[\d_,]*\.?\d+(?:[eE][-+]?\d+)?)\s*([A-Za-z]*)\s*$")
_DECIMAL_COMMA = re.compile(r",(?!\d{3}(?!\d))")


def parse_count(text: str | int | float, *, what: str = "count") -> int:
    """A positive whole number from "1.2B", "350M", "10_000" or 3e8."""
    number, suffix = _split(str(text), what, example="350M, 1.2B or 10_000")
    if suffix.upper() not in _COUNT:
        raise ConfigError(
            f"{what} {text!r} ends in {suffix!r}, which is no multiplier: use K, M, B or T, as in"
            f" {number:g}B"
        )
    value = round(number * _COUNT[suffix.upper()])
    if value > 0 and not suffix and number != value:
        raise ConfigError(f"{what} is {text}, which is no whole number: did you mean {text}B?")
    if value <= 0:
        raise ConfigError(f"{what} is {text}, but must be positive, as in 350M or 1.2B")
    return value


def parse_bytes(text: str | int | float, *, what: str = "size") -> int:
    """Bytes from "10G", "1.5 TB" (powers of ten) or "4GiB" (powers of two)."""
    number, suffix = _split(str(text), what, example="500MB or 10G")
    unit = suffix.upper().removesuffix("B")
    factor = _BYTES.get(unit, _BINARY.get(unit))
    if factor is None or number < 0:
        raise ConfigError(f"{what} {text!r} is not a size: write it as 500MB, 10G or 4GiB")
    return round(number * factor)


def parse_hours(text: str | int | float, *, what: str = "duration") -> float:
    """Hours from "24h", "90min", "2d" or a bare number of hours."""
    number, suffix = _split(str(text), what, example="24h, 90min or 2d")
    unit = suffix.upper() or "H"
    if unit not in _SECONDS or number <= 0:
        raise ConfigError(f"{what} {text!r} is not a duration: write it as 24h, 90min or 2d")
    hours = number * _SECONDS[unit] / 3600.0
    if hours > MOST_HOURS:
        raise ConfigError(f"{what} {text!r} is more than a century: write it as 24h, 90min or 2d")
    return hours


def parse_usd(text: str | int | float, *, what: str = "budget") -> float:
    """Dollars from "100", "$1,017.50" or "1.5K"."""
    number, suffix = _split(str(text).replace("$", ""), what, example="100 or $1,500")
    if suffix.upper() not in _COUNT or number <= 0:
        raise ConfigError(f"{what} {text!r} is not an amount of money: write it as 100 or $1,500")
    usd = number * _COUNT[suffix.upper()]
    if usd > MOST_USD:
        raise ConfigError(f"{what} {text!r} is more money than there is: write it as 100 or $1,500")
    return usd


def format_count(value: float) -> str:
    """`value` with a multiplier and three significant digits: 344M, 1.2B, 24B, 950."""
    return _scaled(value, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")))


def format_bytes(value: float) -> str:
    """`value` bytes in powers of ten: 4.13 GB."""
    steps = ((1e15, " PB"), (1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))
    scaled = _scaled(value, steps)
    return scaled if scaled.endswith("B") else f"{scaled} B"


def format_duration(seconds: float) -> str:
    """`seconds` as 45s, 12m30s, 3h05m or 2d04h."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_usd(usd: float) -> str:
    """`usd` as $0.042, $6.30, $152 or $1,017."""
    if usd != 0 and abs(usd) < 0.1:
        return f"${usd:.3f}"
    return f"${usd:,.2f}" if abs(usd) < 100 else f"${usd:,.0f}"


def _split(text: str, what: str, *, example: str) -> tuple[float, str]:
    match = _NUMBER.match(text)
    if not match:
        raise ConfigError(f"{what} {text!r} is not a number: write it as {example}")
    if _DECIMAL_COMMA.search(match[1]):
        point = text.replace(",", ".")
        raise ConfigError(f"{what} {text!r} has a comma for a decimal point: write it as {point}")
    number = float(match[1].replace("_", "").replace(",", ""))
    if not math.isfinite(number):
        raise ConfigError(f"{what} {text!r} is too large: write it as {example}")
    return number, match[2]


def _scaled(value: float, steps: tuple[tuple[float, str], ...]) -> str:
    for factor, suffix in steps:
        if abs(value) >= factor * 0.9995:
            scaled = value / factor
            digits = max(0, 2 - math.floor(math.log10(abs(scaled)) + 1e-9))
            text = f"{scaled:.{digits}f}"
            return (text.rstrip("0").rstrip(".") if "." in text else text) + suffix
    return f"{value:.3g}" if isinstance(value, float) and value != int(value) else f"{value:.0f}"
