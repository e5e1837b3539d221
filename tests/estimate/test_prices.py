import csv
import datetime
import gzip
import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from casallm.errors import ConfigError
from casallm.estimate import prices
from casallm.estimate.hardware import GPUS
from casallm.estimate.job import SPOT_PRICE_SKEW, SPOT_PRICE_SPREAD
from casallm.estimate.prices import (
    Offer,
    cheapest_regions,
    choose_offers,
    load_prices,
    load_snapshot,
    market_spot_price,
    parse_catalog,
)
from casallm.estimate.throughput import Z90

HEADER = (
    "InstanceType,AcceleratorName,AcceleratorCount,Price,SpotPrice,Region,AvailabilityZone,GpuInfo"
)


def parse(cloud: str, *rows: str):
    return parse_catalog(cloud, csv.DictReader(io.StringIO("\n".join([HEADER, *rows]))))


@pytest.mark.parametrize(
    ("spot", "on_demand"), [(0.0, 3.06), (None, 3.06), (16.936, 16.936), (1.6936, 16.936)]
)
def test_a_placeholder_is_unknown_and_not_cheap(spot, on_demand):
    assert market_spot_price(spot, on_demand) is None


def test_a_market_price_is_kept():
    assert market_spot_price(6.29, 21.96) == 6.29
    assert market_spot_price(17.48, None) == 17.48


def test_zones_of_a_region_become_its_cheapest():
    (offer,) = parse(
        "aws",
        "p4d.24xlarge,A100,8.0,21.95764,8.11,us-east-1,use1-az2,",
        "p4d.24xlarge,A100,8.0,21.95764,6.29,us-east-1,use1-az1,",
        "p4d.24xlarge,A100,8.0,21.95764,2.195764,us-east-1,use1-az3,",
        "p4d.24xlarge,A100,8.0,21.95764,,us-east-1,use1-az4,",
    )

    assert (offer.spot, offer.zone, offer.on_demand) == (6.29, "use1-az1", 21.95764)
    assert offer.hardware is GPUS["A100"]


def test_rows_that_offer_nothing_known_are_left_out():
    assert not parse(
        "aws",
        "m6i.large,,,0.096,0.04,us-east-1,use1-az1,",
        "trn1.2xlarge,Trainium,1.0,1.34,0.4,us-east-1,use1-az1,",
        "p5e.48xlarge,H200,8.0,,,us-east-2,use2-az1,",
    )


def test_a_tenth_of_the_sister_machines_price_is_a_placeholder_too():
    offers = parse(
        "aws",
        "p5e.48xlarge,H200,8.0,,8.7348,ap-southeast-3,apse3-az1,",
        "p5en.48xlarge,H200,8.0,87.34848,8.7348,ap-southeast-3,apse3-az2,",
    )

    assert [offer.spot for offer in offers] == [None, None]


@pytest.mark.parametrize("order", [1, -1])
def test_gcp_adds_the_gpus_to_the_machine_in_either_order(order: int):
    rows = (
        "a2-highgpu-8g,,,7.0,3.0,us-central1,us-central1-a,",
        ",A100,8.0,20.0,9.0,us-central1,us-central1-a,",
    )
    (offer,) = parse("gcp", *rows[::order])

    assert (offer.instance, offer.on_demand, offer.spot) == ("a2-highgpu-8g", 27.0, 12.0)


def test_cards_on_pcie_are_told_apart():
    info = "{'Gpus': [{'Name': 'A100 PCIe'}]}"
    (offer,) = parse("runpod", f'1x_A100-80GB_SECURE,A100-80GB,1.0,1.39,1.39,US,US-KS-2,"{info}"')

    assert offer.hardware.name == "A100-80GB-PCIE"
    assert offer.spot is None


def test_the_users_catalog_comes_before_the_snapshot(tmp_path: Path):
    folder = tmp_path / ".sky" / "catalogs"
    for schema, price in (("v7", 99.0), ("v8", 12.5)):
        (folder / schema / "aws").mkdir(parents=True)
        row = f"p4d.24xlarge,A100,8.0,{price},,us-east-1,use1-az1,"
        (folder / schema / "aws" / "vms.csv").write_text(f"{HEADER}\n{row}\n")

    found = load_prices(tmp_path)

    assert found.source == "SkyPilot catalog"
    assert [offer.on_demand for offer in found.offers] == [12.5]


def write_catalog(home: Path, schema: str, cloud: str, content: bytes, age_days: float = 0) -> None:
    path = home / ".sky" / "catalogs" / schema / cloud / "vms.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    then = datetime.datetime(2026, 11, 20, tzinfo=datetime.UTC).timestamp() - age_days * 86_400
    os.utime(path, (then, then))


GOOD = f"{HEADER}\np4d.24xlarge,A100,8.0,12.5,,us-east-1,use1-az1,\n".encode()


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\xff\xfe\x00nonsense\x00\n",
        b"name,cost\np4d,21.96\n",
        b"InstanceType,AcceleratorName,AcceleratorCount\np4d.24xlarge,A100,8\n",
        f"{HEADER}\np4d.24xlarge,A100\n".encode(),
        f"{HEADER}\np4d.24xlarge,A100,eight,cheap,-1,us-east-1,use1-az1,\n".encode(),
        b'"' + b"x" * 200_000,
    ],
    ids=["empty", "binary", "other columns", "no prices", "short row", "no numbers", "no end"],
)
def test_a_broken_catalog_is_passed_over(tmp_path: Path, broken: bytes):
    write_catalog(tmp_path, "v9", "aws", broken)

    assert load_prices(tmp_path) == load_snapshot()

    write_catalog(tmp_path, "v8", "aws", GOOD)

    assert [offer.on_demand for offer in load_prices(tmp_path).offers] == [12.5]


def test_a_broken_file_costs_only_its_own_cloud_and_is_named(tmp_path: Path, caplog):
    write_catalog(tmp_path, "v8", "aws", GOOD)
    write_catalog(tmp_path, "v8", "lambda", b"\xff\xfe\x00")

    assert {offer.cloud for offer in load_prices(tmp_path).offers} == {"aws"}
    assert "lambda/vms.csv are left out, it cannot be read" in caplog.text


def test_a_catalog_is_as_old_as_the_oldest_of_its_files(tmp_path: Path):
    write_catalog(tmp_path, "v8", "aws", GOOD, age_days=50)
    write_catalog(tmp_path, "v8", "lambda", GOOD)
    write_catalog(tmp_path, "v8", "azure", b"no prices", age_days=99)

    assert load_prices(tmp_path).as_of == datetime.date(2026, 10, 1)


def test_aws_sells_the_links_that_are_counted():
    """Against what DescribeInstanceTypes answers, as moto keeps it."""
    moto = pytest.importorskip("moto")
    path = Path(moto.__file__).parent / "ec2" / "resources" / "instance_types.json.gz"
    published = json.loads(gzip.decompress(path.read_bytes()))
    known = [name for name in published if name.split(".")[0] in prices.NODE_GBITS]

    assert len(known) > 30
    for name in known:
        network = published[name]["NetworkInfo"]
        text = network["NetworkPerformance"]
        count, _, each = text.removesuffix(" Gigabit").rpartition("x ")
        gbits = network["NetworkCards"][0].get("BaselineBandwidthInGbps")
        if not text.startswith("Up to"):
            gbits = float(each) * int(count or 1)
        one = Offer("aws", "us-east-1", "", name, GPUS["A10G"], 1, 1.0, None)
        assert one.node_bandwidth == gbits * 1e9 / 8, name


def test_without_a_catalog_the_snapshot_answers(tmp_path: Path):
    assert load_prices(tmp_path) == load_snapshot()


def test_the_snapshot_knows_its_day_and_its_sources():
    snapshot = load_snapshot()
    text = Path(prices.__file__).with_name("prices.json").read_text("utf-8")

    assert snapshot.as_of == datetime.date(2026, 11, 22)
    assert snapshot.age_days(datetime.date(2026, 12, 2)) == 10
    assert "skypilot-catalog" in json.loads(text)["sources"][0]


@pytest.mark.parametrize(
    ("instance", "region", "on_demand"),
    [
        ("p4d.24xlarge", "us-east-1", 21.96),
        ("p4de.24xlarge", "us-east-1", 27.45),
        ("p5.48xlarge", "us-east-1", 55.04),
        ("gpu_8x_h100_sxm5", "us-east-1", 31.92),
        ("1x_A100-80GB_SECURE", "US", 1.39),
    ],
)
def test_the_snapshot_has_the_prices_of_the_facts(instance, region, on_demand):
    offers = [o for o in load_snapshot().offers if (o.instance, o.region) == (instance, region)]

    assert [round(offer.on_demand or 0, 2) for offer in offers] == [on_demand]


def test_the_snapshot_is_the_shared_catalog(shared_data: Path):
    catalog = prices.read_catalog(shared_data / "skypilot-catalog")
    assert catalog is not None
    snapshot = set(load_snapshot().offers)

    assert set(catalog.offers) <= snapshot
    assert {offer.cloud for offer in snapshot - set(catalog.offers)} == {"lambda", "nebius"}


def test_the_spread_of_spot_prices_is_that_of_the_next_zone(shared_data: Path):
    zones: dict[tuple[str, str], list[float]] = {}
    with (shared_data / "skypilot-catalog" / "aws" / "vms.csv").open() as file:
        for row in csv.DictReader(file):
            price = market_spot_price(float(row["SpotPrice"] or 0), float(row["Price"] or 0))
            if price:
                zones.setdefault((row["InstanceType"], row["Region"]), []).append(price)
    steps = [sorted(each)[1] / min(each) for each in zones.values() if len(each) > 1]

    assert len(steps) == 36
    dearer = math.exp(Z90 * SPOT_PRICE_SPREAD * SPOT_PRICE_SKEW)
    assert np.quantile(steps, 0.9) == pytest.approx(dearer, rel=0.02)


def test_each_machine_is_offered_where_it_is_cheapest():
    best = {
        (offer.instance, is_spot): offer.region
        for offer, is_spot in cheapest_regions(load_snapshot().offers)
    }

    assert best["p4d.24xlarge", True] == "ap-south-1"
    assert best["p4d.24xlarge", False].startswith("us-")
    assert ("gpu_8x_a100", True) not in best


def test_nothing_that_matches_is_a_sentence(few_prices):
    with pytest.raises(ConfigError, match="cloud 'awz', did you mean aws"):
        choose_offers(few_prices, cloud="awz")
    with pytest.raises(ConfigError, match="region 'us-est-1', did you mean us-east-1"):
        choose_offers(few_prices, region="us-est-1")
    with pytest.raises(ConfigError, match=r"price is known for A100:2 .* is sold by 1, 8, or give"):
        choose_offers(few_prices, hardware=GPUS["A100"], n_gpus=2)
    with pytest.raises(ConfigError, match=r"for L4 .* another GPU, cloud .*--price-per-gpu-hour"):
        choose_offers(few_prices, hardware=GPUS["L4"])
