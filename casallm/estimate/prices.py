"""What machines cost: offers from the user's SkyPilot catalog, or from a dated snapshot.

SkyPilot keeps its catalog as CSV files under `~/.sky/catalogs/<schema>/<cloud>/vms.csv`; they are
read as they are, without `sky`. Where there is none, `prices.json` answers: the same figures,
reduced to one row a machine and price, with the day they were read and where.

Three kinds of spot price are placeholders and no market prices: 0.00, the on-demand price itself,
and exactly a tenth of it. They are unknown here, not cheap.
"""

import csv
import datetime
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from casallm.config import nearest
from casallm.errors import ConfigError
from casallm.estimate.hardware import GPUS, Hardware

log = logging.getLogger(__name__)

SNAPSHOT_COLUMNS = ("cloud", "regions", "zone", "instance", "gpu", "n_gpus", "on_demand", "spot")

STALE_DAYS = 30
"""Age at which prices are called old."""

GIVEN = "given"
"""The cloud of a machine whose price was given by hand: only its own hours are counted."""

ETHERNET_GBITS = 100.0
"""Gbit/s between nodes of machines of which nothing else is known here."""

NODE_GBITS = {
    "p3.2xlarge": 2.5, "p3.8xlarge": 10, "p3.16xlarge": 25, "p3dn": 100,
    "p4d": 400, "p4de": 400, "p5.4xlarge": 100, "p5": 3200, "p5e": 3200, "p5en": 3200,
    "p6-b200": 3200, "p6-b300": 6400,
    "g4dn.xlarge": 5, "g4dn.2xlarge": 10, "g4dn.4xlarge": 20, "g4dn": 50, "g4dn.metal": 100,
    "g5.xlarge": 2.5, "g5.2xlarge": 5, "g5.4xlarge": 10, "g5": 25, "g5.12xlarge": 40,
    "g5.24xlarge": 50, "g5.48xlarge": 100,
    "g6.xlarge": 2.5, "g6.2xlarge": 5, "g6.4xlarge": 10, "g6": 25, "g6.12xlarge": 40,
    "g6.24xlarge": 50, "g6.48xlarge": 100,
    "g6e.xlarge": 2.5, "g6e.2xlarge": 5, "g6e.4xlarge": 20, "g6e": 25, "g6e.12xlarge": 100,
    "g6e.16xlarge": 35, "g6e.24xlarge": 200, "g6e.48xlarge": 400,
}  # fmt: skip
"""Gbit/s between AWS's machines, by instance or else by family, all adapters together: what its API
calls NetworkPerformance, and the baseline where that is "up to" a burst."""

_GCP_HOSTS = {
    "A100": "a2-highgpu-{}g",
    "A100-80GB": "a2-ultragpu-{}g",
    "H100": "a3-highgpu-{}g",
    "H200": "a3-ultragpu-{}g",
}
"""GCP's catalog prices the GPUs apart from the machine that holds them; the two are added."""


@dataclass(frozen=True)
class Offer:
    """A machine that can be rented, with its price on demand and as spot."""

    cloud: str
    region: str
    """Where it is cheapest; other regions are other offers."""
    zone: str
    """Where spot is cheapest; empty where the cloud does not say."""
    instance: str
    hardware: Hardware
    n_gpus: int
    on_demand: float | None
    """Dollars an hour for the whole machine; None: not sold that way."""
    spot: float | None
    """The same, preemptible; None: not sold, or no market price known."""

    @property
    def node_bandwidth(self) -> float | None:
        """Bytes a second to another of its kind; None: as usual for the GPU."""
        if self.cloud == GIVEN:
            return None
        family = NODE_GBITS.get(self.instance.split(".")[0], ETHERNET_GBITS)
        return NODE_GBITS.get(self.instance, family) * 1e9 / 8


@dataclass(frozen=True)
class Prices:
    """Every offer known, and how old that knowledge is."""

    offers: tuple[Offer, ...]
    as_of: datetime.date
    source: str
    """What a person should know about where they come from."""

    def age_days(self, today: datetime.date) -> int:
        """Days since the prices were read."""
        return max(0, (today - self.as_of).days)


def load_prices(home: Path | None = None) -> Prices:
    """The newest SkyPilot catalog beneath `home` (default: SkyPilot's own), or the snapshot."""
    root = home or Path(os.environ.get("SKY_RUNTIME_DIR") or Path.home())
    catalogs = sorted((root / ".sky" / "catalogs").glob("v*"), key=_schema_number)
    for catalog in reversed(catalogs):
        found = read_catalog(catalog)
        if found is not None:
            return found
    return load_snapshot()


def load_snapshot() -> Prices:
    """The prices that ship with the package."""
    text = resources.files("casallm.estimate").joinpath("prices.json").read_text("utf-8")
    tree = json.loads(text)
    offers: list[Offer] = []
    for row in tree["offers"]:
        cells = dict(zip(tree["columns"], row, strict=True))
        hardware = GPUS[cells.pop("gpu")]
        offers.extend(
            Offer(region=region, hardware=hardware, **cells)
            for region in cells.pop("regions").split()
        )
    return Prices(tuple(offers), datetime.date.fromisoformat(tree["as_of"]), "snapshot of casallm")


def read_catalog(catalog: Path) -> Prices | None:
    """The offers of one SkyPilot catalog directory; None where it holds no known GPU.

    It is as old as the oldest of its files: SkyPilot renews those of the clouds that are used.
    """
    offers: list[Offer] = []
    read_at: list[float] = []
    for path in sorted(catalog.glob("*/vms.csv")):
        try:
            with path.open(encoding="utf-8", newline="") as file:
                found = parse_catalog(path.parent.name, csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            log.warning("prices in %s are left out, it cannot be read: %s", path, error)
            continue
        if found:
            offers.extend(found)
            read_at.append(path.stat().st_mtime)
    if not offers:
        return None
    day = datetime.datetime.fromtimestamp(min(read_at), datetime.UTC).date()
    return Prices(tuple(offers), day, "SkyPilot catalog")


def parse_catalog(cloud: str, rows: Iterable[Mapping[str, str]]) -> list[Offer]:
    """One offer for every machine and region among `rows`, spot at its cheapest zone."""
    best: dict[tuple[str, str, str], Offer] = {}
    rows = list(rows)
    hosts = {
        (row.get("InstanceType") or "", row.get("AvailabilityZone") or ""): row
        for row in rows
        if cloud == "gcp" and not row.get("AcceleratorName")
    }
    for row in rows:
        offer = _offer(cloud, row, hosts)
        if offer is None:
            continue
        key = (offer.instance, offer.hardware.name, offer.region)
        best[key] = _cheaper(best[key], offer) if key in best else offer
    return [_without_borrowed_spot(offer, best.values()) for offer in best.values()]


def market_spot_price(spot: float | None, on_demand: float | None) -> float | None:
    """`spot` if it is a market price, None if it is one of the three placeholders."""
    if not spot or not math.isfinite(spot) or spot < 0:
        return None
    if on_demand and any(math.isclose(spot, on_demand * f, rel_tol=2e-4) for f in (1.0, 0.1)):
        return None
    return spot


def snapshot_rows(offers: Iterable[Offer]) -> list[list[object]]:
    """Rows of `prices.json`: offers that differ in nothing but their region become one."""
    merged: dict[tuple[object, ...], list[str]] = {}
    for o in offers:
        key = (o.zone, o.instance, o.hardware.name, o.n_gpus, o.on_demand, o.spot)
        merged.setdefault((o.cloud, *key), []).append(o.region)
    return [[cloud, " ".join(where), *rest] for (cloud, *rest), where in merged.items()]


def choose_offers(
    prices: Prices,
    *,
    cloud: str | None = None,
    region: str | None = None,
    hardware: Hardware | None = None,
    n_gpus: int | None = None,
) -> list[Offer]:
    """The offers that match; ConfigError names the nearest cloud or region where none does."""
    offers = list(prices.offers)
    if cloud:
        offers = _only(offers, "cloud", cloud, {offer.cloud for offer in offers})
    if region:
        offers = _only(offers, "region", region, {offer.region for offer in offers})
    if hardware:
        family = (hardware.name, f"{hardware.name}-PCIE")
        offers = [offer for offer in offers if offer.hardware.name in family]
    sold = sorted({offer.n_gpus for offer in offers})
    if n_gpus:
        offers = [offer for offer in offers if offer.n_gpus == n_gpus]
    if not offers:
        wanted = hardware.name if hardware else "a machine"
        wanted += f":{n_gpus}" if hardware and n_gpus else ""
        other = "ask for another GPU, cloud or region"
        if sold:
            other = f"it is sold by {', '.join(map(str, sold))}"
        raise ConfigError(
            f"no price is known for {wanted} ({prices.source} of {prices.as_of}): {other}, or give"
            " a price with --price-per-gpu-hour"
        )
    return offers


def cheapest_regions(offers: Iterable[Offer]) -> list[tuple[Offer, bool]]:
    """Each machine twice at most: (offer, is spot), both where it is cheapest."""
    best: dict[tuple[str, str, str, bool], Offer] = {}
    for offer in offers:
        for is_spot, price in ((False, offer.on_demand), (True, offer.spot)):
            if price is None:
                continue
            key = (offer.cloud, offer.instance, offer.hardware.name, is_spot)
            known = best.get(key)
            if known is None or _rank(offer, price) < _rank(known, hourly_price(known, is_spot)):
                best[key] = offer
    return [(offer, key[-1]) for key, offer in best.items()]


def hourly_price(offer: Offer, is_spot: bool) -> float:
    """Dollars an hour for the whole machine; infinite where it is not sold that way."""
    price = offer.spot if is_spot else offer.on_demand
    return math.inf if price is None else price


def _rank(offer: Offer, price: float) -> tuple[float, bool, str]:
    """Cheapest first; among equals regions in the US, where most other services are."""
    return price, not offer.region.startswith("us-"), offer.region


def _only(offers: list[Offer], field: str, wanted: str, known: set[str]) -> list[Offer]:
    matching = [offer for offer in offers if getattr(offer, field).lower() == wanted.lower()]
    if not matching:
        hint = nearest(wanted, known) or f" (known: {', '.join(sorted(known))})"
        if not hint.endswith("?"):
            hint += ": take one of them, or give a price with --price-per-gpu-hour"
        raise ConfigError(f"no GPU price is known for {field} {wanted!r}{hint}")
    return matching


def _offer(
    cloud: str, row: Mapping[str, str], hosts: Mapping[tuple[str, str], Mapping[str, str]]
) -> Offer | None:
    name, zone = row.get("AcceleratorName") or "", row.get("AvailabilityZone") or ""
    count = _number(row.get("AcceleratorCount")) or 0
    instance = row.get("InstanceType") or ""
    on_demand, spot = _number(row.get("Price")), _number(row.get("SpotPrice"))
    spot = market_spot_price(spot, on_demand)
    hardware = GPUS.get(name)
    if cloud == "gcp" and not instance:
        instance = _GCP_HOSTS.get(name, "").format(int(count))
        host = hosts.get((instance, zone), {})
        on_demand = _sum(on_demand, _number(host.get("Price")))
        spot = _sum(spot, _number(host.get("SpotPrice")))
    if hardware is None or count < 1 or (on_demand is None and spot is None):
        return None
    if "pcie" in f"{instance} {row.get('GpuInfo') or ''}".lower():
        hardware = GPUS.get(f"{name}-PCIE", hardware)
    return Offer(
        cloud=cloud,
        region=row.get("Region") or "",
        zone=zone if spot is not None else "",
        instance=instance,
        hardware=hardware,
        n_gpus=int(count),
        on_demand=on_demand,
        spot=spot,
    )


def _without_borrowed_spot(offer: Offer, others: Iterable[Offer]) -> Offer:
    """Without a spot price that is a placeholder of the same GPUs in another machine.

    A machine that is not sold on demand gets a tenth of its sister's price in the catalog.
    """
    if offer.on_demand is not None or offer.spot is None:
        return offer
    wanted = (offer.region, offer.hardware.name, offer.n_gpus)
    for other in others:
        is_sister = (other.region, other.hardware.name, other.n_gpus) == wanted
        if is_sister and market_spot_price(offer.spot, other.on_demand) is None:
            return replace(offer, spot=None, zone="")
    return offer


def _cheaper(known: Offer, other: Offer) -> Offer:
    """The offer whose spot price is lower; on-demand prices are the same across zones."""
    return other if hourly_price(other, True) < hourly_price(known, True) else known


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _schema_number(path: Path) -> int:
    digits = path.name.removeprefix("v")
    return int(digits) if digits.isdigit() else -1
