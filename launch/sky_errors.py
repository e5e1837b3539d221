"""SkyPilot's exceptions as one sentence each, with the command that helps."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from casallm.errors import CasallmError, CloudError
from launch import aws

CAPACITY_CODES = (
    "InsufficientInstanceCapacity",
    "InsufficientHostCapacity",
    "InsufficientReservedInstanceCapacity",
    "InsufficientCapacity",
    "UnfulfillableCapacity",
    "SpotMaxPriceTooLow",
)
"""What AWS answers where it has no such machine just now."""

QUOTA_CODES = ("VcpuLimitExceeded", "MaxSpotInstanceCountExceeded", "InstanceLimitExceeded")
"""What AWS answers where more time brings no machine, but a larger quota does."""

_REFUSAL = re.compile(
    r"An error occurred \((\w+)\) when calling the \w+ operation(?: \([^)]*\))?: ([^\n]+)"
)


class NoCapacityError(CloudError):
    """The cloud has no such machine to rent out just now; it may have one later."""


class AbsentError(CloudError):
    """SkyPilot knows of no such cluster."""


class NotUpError(CloudError):
    """SkyPilot knows of the cluster, and does not reach it."""


@contextlib.contextmanager
def explained(log: Callable[[], str] = str) -> Iterator[None]:
    """Turn SkyPilot's exceptions into one sentence with the command that helps.

    `log` gives what SkyPilot said on the way, where the cloud's own words stand.
    """
    from sky import exceptions

    try:
        yield
    except CasallmError:
        raise
    except exceptions.ClusterDoesNotExist as error:
        raise AbsentError(_first_sentence(error)) from None
    except exceptions.ClusterNotUpError as error:
        raise NotUpError(_first_sentence(error)) from None
    except exceptions.ResourcesUnavailableError as error:
        raise _unavailable(error, log()) from None
    except exceptions.NoCloudAccessError:
        raise CloudError(
            "SkyPilot may use no cloud with these credentials: `sky check` says why"
        ) from None
    except (exceptions.RequestCancelled, exceptions.ApiServerConnectionError) as error:
        raise CloudError(
            f"SkyPilot's API server stopped ({_first_sentence(error)}): run the same command again"
        ) from None
    except Exception as error:  # noqa: BLE001 - the server sends on whatever it met
        said = _first_sentence(error).rstrip(".")
        raise CloudError(f"SkyPilot: {said} (see ~/.sky/api_server/server.log)") from None


def _unavailable(error: Any, log: str) -> CloudError:
    """Why no machine was got, in the cloud's own words where it gave any."""
    history = [str(each) for each in getattr(error, "failover_history", ())]
    refusals = dict(_REFUSAL.findall("\n".join([log, str(error), *history])))
    said = _quoted(refusals) if refusals else (history or [_first_sentence(error)])[0].strip()
    if refusals.keys() & {*CAPACITY_CODES} or (history and not refusals):
        return NoCapacityError(f"no machine of the plan is to be had now ({said})")
    if refusals.keys() & {*QUOTA_CODES}:
        return CloudError(
            f"the account may run no more such machines ({said}): ask for a larger quota, as"
            " docs/guides/pretrain-on-aws.md says"
        )
    if refusals.keys() & {*aws.DENIED}:
        return CloudError(
            f"AWS lets nobody rent with these credentials ({said}): attach the policy of"
            " docs/guides/pretrain-on-aws.md to your user"
        )
    return CloudError(
        f"no machine can be rented for the plan ({said}): choose another with GPU=, REGION= or"
        " SPOT="
    )


def _quoted(refusals: Mapping[str, str]) -> str:
    code, words = next(iter(refusals.items()))
    return f"{code}: {words.partition('. ')[0].strip().rstrip('.')}"


def _first_sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
