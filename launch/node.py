"""What a task asks the launcher on the node: may it begin, what this machine costs, whom to tell.

`tasks/*.yaml` call these as `python -m launch begin`, `price` and `notify`. The last two may not
stop a job: what cannot be found out is left empty and said on stderr.
"""

import http.client
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime

from casallm.errors import CloudError
from casallm.estimate.prices import hourly_price, load_prices
from casallm.storage.store import Store
from casallm.train.attempts import read_chain
from launch.request import CAPACITY_HOURS

log = logging.getLogger(__name__)

METADATA = "http://169.254.169.254/latest"
"""AWS's metadata service, as seen from every instance."""

EXIT_AGAIN = 75

CLOCK_SLACK_SECONDS = 3600.0

SETUP_HOURS = 1.0
"""From a machine that was got in time to the run's first start: boot, installation, retries."""

_TIMEOUT_SECONDS = 5.0


def usd_per_hour(environment: Mapping[str, str] | None = None) -> float | None:
    """Dollars an hour of all nodes of this job; None where unknown.

    What AWS asks for such a spot machine now, else the plan's price, else that of the price list.
    """
    env = os.environ if environment is None else environment
    cluster = _cluster(env)
    cloud, region = str(cluster.get("cloud", "")).lower(), str(cluster.get("region", ""))
    instance = _ask("meta-data/instance-type") if cloud == "aws" else ""
    is_spot = cloud == "aws" and _ask("meta-data/instance-life-cycle") == "spot"
    price = market_price(region, str(cluster.get("zone") or ""), instance) if is_spot else None
    if price is None:
        price = planned_price(env.get("OFFERS", ""), cloud, region, instance)
    if price is None:
        price = listed_price(cloud, region, instance, is_spot=is_spot)
    if price is None:
        log.warning(
            "no price is known for %s %s in %s: no dollars are counted", cloud, instance, region
        )
        return None
    return price * int(env.get("SKYPILOT_NUM_NODES") or 1)


def market_price(region: str, zone: str, instance: str) -> float | None:
    """Dollars an hour that AWS asks now for a spot machine in the zone; None where it does not say.

    The node asks with its own role (ec2:DescribeSpotPriceHistory).
    """
    try:
        import botocore.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
    except ImportError:
        return None
    limits = Config(connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 2})
    try:
        ec2 = botocore.session.get_session().create_client("ec2", region_name=region, config=limits)
        answer = ec2.describe_spot_price_history(
            InstanceTypes=[instance],
            ProductDescriptions=["Linux/UNIX"],
            Filters=[{"Name": "availability-zone", "Values": [zone]}],
            StartTime=datetime.now(UTC),
        )
        prices = [float(each["SpotPrice"]) for each in answer["SpotPriceHistory"][:1]]
    except (BotoCoreError, ClientError, ResponseParserError, KeyError, ValueError) as error:
        log.warning("AWS does not say what %s costs as spot in %s (%s)", instance, zone, error)
        return None
    return prices[0] if prices and prices[0] > 0 else None


def planned_price(offers: str, cloud: str, region: str, instance: str) -> float | None:
    """The price that the launcher put into OFFERS (`cloud/region/instance=price,...`)."""
    prices = dict(offer.split("=", 1) for offer in offers.split(",") if "=" in offer)
    exact = prices.get(f"{cloud}/{region}/{instance}")
    if exact is not None:
        return float(exact)
    same_place = [float(v) for k, v in prices.items() if k.startswith(f"{cloud}/{region}/")]
    return max(same_place) if same_place and not instance else None


def listed_price(cloud: str, region: str, instance: str, *, is_spot: bool) -> float | None:
    """The price in the list that ships with casallm, for a task that was launched by hand."""
    for offer in load_prices().offers:
        if (offer.cloud, offer.region, offer.instance) == (cloud, region, instance):
            price = hourly_price(offer, is_spot)
            return price if price < float("inf") else None
    return None


def require_in_time(run: Store, launched_at: str, now: float) -> None:
    """CloudError where a machine came so late that nobody expects the run to begin any more.

    `launched_at` (seconds since the epoch; empty for a task launched by hand) begins the wait that
    the plan stated. A run that has begun since then may be recovered at any time.
    """
    if not launched_at:
        return
    since = float(launched_at)  # by the clock of another computer
    hours = (now - since) / 3600
    if hours < CAPACITY_HOURS + SETUP_HOURS or _has_begun_since(run, since - CLOCK_SLACK_SECONDS):
        return
    raise CloudError(
        f"the machine came {hours:.1f} h after the launch of {run.url}, which was to wait"
        f" {CAPACITY_HOURS:g} h for one: nothing is trained, run the same command again"
    )


def notify(url: str, text: str) -> bool:
    """Post `text` to a webhook (`{"text": ...}`, as Slack, Mattermost and Teams take it)."""
    body = json.dumps({"text": text}).encode()
    headers = {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(url, data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
            return True
    except (http.client.HTTPException, OSError, ValueError) as error:
        # its address is a secret, which some errors quote: only their kind is said
        code = getattr(error, "code", "")
        log.warning("the webhook did not take the message (%s %s)", type(error).__name__, code)
        return False


def ending_text(run: str, exit_code: int, reason: str | None) -> str | None:
    """What to tell about a job that ended; None when it will be started again by itself."""
    if exit_code == EXIT_AGAIN:
        return None
    if exit_code == 0:
        return f"casallm: {run} is finished: {reason or 'done'}"
    return f"casallm: {run} failed (exit code {exit_code}): see `make logs RUN={run}`"


def _has_begun_since(run: Store, since: float) -> bool:
    links = read_chain(run).links
    began = links[0].attempt.info.get("time") if links else None
    return bool(links) and (not began or datetime.fromisoformat(str(began)).timestamp() >= since)


def _cluster(env: Mapping[str, str]) -> dict[str, object]:
    try:
        return dict(json.loads(env.get("SKYPILOT_CLUSTER_INFO", "{}")))
    except ValueError:
        return {}


def _ask(path: str) -> str:
    """What the metadata service says (IMDSv2); empty when nobody answers."""
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _fetch(urllib.request.Request(f"{METADATA}/api/token", headers=lifetime, method="PUT"))
    header = {"X-aws-ec2-metadata-token": token}
    return _fetch(urllib.request.Request(f"{METADATA}/{path}", headers=header))


def _fetch(request: urllib.request.Request) -> str:
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            return str(response.read().decode("utf-8", "replace")).strip()
    except (urllib.error.URLError, OSError):
        return ""
