import json
import time

import pytest

from casallm.errors import CloudError
from casallm.storage.store import open_store
from casallm.train.attempts import claim
from launch import node

CLUSTER = '{"cluster_name": "c", "cloud": "AWS", "region": "us-east-1", "zone": "us-east-1a"}'
OFFERS = "aws/us-east-1/p4d.24xlarge=6.289,aws/us-east-2/p4d.24xlarge=6.66"


@pytest.fixture
def metadata(stub, monkeypatch):
    monkeypatch.setattr(node, "METADATA", stub.url)
    stub.body = b"p4d.24xlarge"
    return stub


def test_the_price_is_that_of_the_plan_for_the_machine_really_got_times_the_nodes(metadata):
    env = {"SKYPILOT_CLUSTER_INFO": CLUSTER, "OFFERS": OFFERS, "SKYPILOT_NUM_NODES": "2"}

    assert node.usd_per_hour(env) == pytest.approx(2 * 6.289)


def test_a_spot_machine_costs_what_aws_asks_for_it_now(metadata, monkeypatch):
    asked = []
    monkeypatch.setattr(node, "market_price", lambda *where: asked.append(where) or 9.5)
    metadata.body = b"spot"  # the stub's one answer: the instance's type as well as its life cycle

    price = node.usd_per_hour({"SKYPILOT_CLUSTER_INFO": CLUSTER, "SKYPILOT_NUM_NODES": "2"})

    assert (price, asked) == (19.0, [("us-east-1", "us-east-1a", "spot")])


PRICES = """<DescribeSpotPriceHistoryResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/">
<spotPriceHistorySet>{}</spotPriceHistorySet></DescribeSpotPriceHistoryResponse>"""
PRICE = "<item><spotPrice>{}</spotPrice><availabilityZone>us-east-1a</availabilityZone></item>"


@pytest.mark.parametrize(
    ("items", "price"),
    [(PRICE.format("7.1234") + PRICE.format("6.5"), 7.1234), ("", None), (PRICE.format("x"), None)],
)
def test_the_market_price_is_the_first_that_ec2_names(account, stub, bare_laptop, items, price):
    bare_laptop.setenv("AWS_ENDPOINT_URL", stub.url)
    stub.body = PRICES.format(items).encode()

    assert node.market_price("us-east-1", "us-east-1a", "p4d.24xlarge") == price

    assert b"Action=DescribeSpotPriceHistory" in stub.received[0]
    assert b"us-east-1a" in stub.received[0]


def test_where_aws_does_not_say_the_market_price_the_plans_counts(account, stub, bare_laptop):
    bare_laptop.setenv("AWS_ENDPOINT_URL", stub.url)
    stub.status = 403

    assert node.market_price("us-east-1", "us-east-1a", "p4d.24xlarge") is None


def test_launched_by_hand_the_price_is_that_of_the_list(metadata, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))

    assert node.usd_per_hour({"SKYPILOT_CLUSTER_INFO": CLUSTER}) == pytest.approx(21.957642)


def test_a_machine_that_nobody_priced_costs_nothing_known_and_says_so(metadata, caplog):
    metadata.body = b"x9.huge"

    assert node.usd_per_hour({"SKYPILOT_CLUSTER_INFO": CLUSTER, "OFFERS": OFFERS}) is None
    assert "no price is known for aws x9.huge in us-east-1" in caplog.text


def test_without_a_metadata_service_the_dearest_offer_of_the_region_counts(monkeypatch):
    offers = f"{OFFERS},aws/us-east-1/p5.48xlarge=14.25"

    assert node.planned_price(offers, "aws", "us-east-1", "") == 14.25


HOUR = 3600.0


@pytest.fixture
def run(tmp_path):
    return open_store(str(tmp_path / "run"))


def test_a_machine_that_comes_in_time_may_begin(run):
    node.require_in_time(run, "1000", now=1000 + 2.9 * HOUR)
    node.require_in_time(run, "", now=10**9)  # launched by hand


def test_a_machine_that_comes_when_nobody_expects_it_trains_nothing(run):
    with pytest.raises(CloudError) as refused:
        node.require_in_time(run, "1000", now=1000 + 30 * HOUR)

    assert str(refused.value) == (
        f"the machine came 30.0 h after the launch of {run.url}, which was to wait 2 h for one:"
        " nothing is trained, run the same command again"
    )


def test_a_run_that_has_begun_since_its_launch_may_be_recovered_at_any_time(run):
    launched_at = time.time() - 60
    claim(run, parent=None)

    node.require_in_time(run, f"{launched_at:.0f}", now=launched_at + 1000 * HOUR)
    with pytest.raises(CloudError):  # what began before counts for another launch
        node.require_in_time(run, f"{launched_at + 5000:.0f}", now=launched_at + 1000 * HOUR)


def test_the_webhook_gets_one_message(stub):
    assert node.notify(stub.url, "casallm: x is finished: done")

    assert json.loads(stub.received[0]) == {"text": "casallm: x is finished: done"}


def test_a_webhook_that_refuses_stops_nothing_and_is_not_named(stub, caplog):
    stub.status = 500

    assert not node.notify(f"{stub.url}/secret-path", "text")

    assert "the webhook did not take the message" in caplog.text
    assert "secret-path" not in caplog.text


@pytest.mark.parametrize("url", ["http://x y/canary", "http://[canary", "nothing/canary"])
def test_an_address_that_is_none_stops_nothing_and_is_not_named(url, caplog):
    assert not node.notify(url, "text")

    assert "canary" not in caplog.text


@pytest.mark.parametrize(
    ("exit_code", "reason", "text"),
    [
        (0, "the budget is spent", "casallm: s3://b/r is finished: the budget is spent"),
        (0, None, "casallm: s3://b/r is finished: done"),
        (1, None, "casallm: s3://b/r failed (exit code 1): see `make logs RUN=s3://b/r`"),
        (75, None, None),
    ],
)
def test_finish_failure_and_budget_are_told_and_a_preemption_is_not(exit_code, reason, text):
    assert node.ending_text("s3://b/r", exit_code, reason) == text
