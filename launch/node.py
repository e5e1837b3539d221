"""What a task asks the launcher while it runs on the node: what this machine costs, whom to tell.

`tasks/*.yaml` call these as `python -m launch price` and `python -m launch notify`. Neither may
stop a job: what cannot be found out is left empty and said on stderr.
"""

import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Mapping

from casallm.estimate.prices import hourly_price, load_prices

log = logging.getLogger(__name__)

METADATA = "http://169.254.169.254/latest"
"""AWS's metadata service, as seen from every instance."""

EXIT_AGAIN = 75

_TIMEOUT_SECONDS = 5.0


def usd_per_hour(environment: Mapping[str, str] | None = None) -> float | None:
    """Dollars an hour of all nodes of this job, by the plan's prices; None where unknown."""
    env = os.environ if environment is None else environment
    cluster = _cluster(env)
    cloud, region = str(cluster.get("cloud", "")).lower(), str(cluster.get("region", ""))
    instance = _ask("meta-data/instance-type") if cloud == "aws" else ""
    is_spot = cloud == "aws" and _ask("meta-data/instance-life-cycle") == "spot"
    price = planned_price(env.get("OFFERS", ""), cloud, region, instance)
    if price is None:
        price = listed_price(cloud, region, instance, is_spot=is_spot)
    if price is None:
        log.warning(
            "no price is known for %s %s in %s: no dollars are counted", cloud, instance, region
        )
        return None
    return price * int(env.get("SKYPILOT_NUM_NODES") or 1)


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


def notify(url: str, text: str) -> bool:
    """Post `text` to a webhook (`{"text": ...}`, as Slack, Mattermost and Teams take it)."""
    body = json.dumps({"text": text}).encode()
    headers = {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(url, data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
            return True
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", type(error).__name__)
        log.warning("the webhook did not take the message (%s)", reason)
        return False


def ending_text(run: str, exit_code: int, reason: str | None) -> str | None:
    """What to tell about a job that ended; None when it will be started again by itself."""
    if exit_code == EXIT_AGAIN:
        return None
    if exit_code == 0:
        return f"casallm: {run} is finished: {reason or 'done'}"
    return f"casallm: {run} failed (exit code {exit_code}): see `make logs RUN={run}`"


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
