"""SkyPilot's API server: ask it for something, wait for the answer, bounded. Imports `sky`, late.

The server is on this computer unless configured otherwise, where the first call starts it. Machines
never get keys: they use the role that SkyPilot gives them, and the controller of managed jobs is
deleted, not stopped, when it is idle.
"""

import contextlib
import io
import logging
import time
from functools import cache
from typing import Any

from casallm.errors import CloudError, MissingExtraError
from launch.sky_errors import explained

log = logging.getLogger(__name__)

CONFIG = (
    "aws.remote_identity=SERVICE_ACCOUNT",
    "jobs.controller.resources.autostop.idle_minutes=10",
    "jobs.controller.resources.autostop.down=true",
)
"""Settings of SkyPilot that hold for everything launched here."""

POLL_SECONDS = 2.0
LOG_LINES = 200
CALL_SECONDS = 300.0
"""For anything but a launch or an end; a busy server takes minutes over what it does in one."""


@cache
def sdk() -> Any:
    """SkyPilot, with our settings applied once a process."""
    try:
        import sky
        import sky.jobs
        from sky import skypilot_config
    except ImportError:
        raise MissingExtraError("skypilot", "cloud") from None
    skypilot_config.apply_cli_config(list(CONFIG))
    return sky


def finish(request: Any, *, what: str, seconds: float = CALL_SECONDS) -> Any:
    """The result of a request to the API server; CloudError when it takes too long."""
    sky = sdk()
    deadline, pause = time.monotonic() + seconds, 0.2
    with explained(lambda: _log_of(request)):
        while not _is_over(request):
            if time.monotonic() > deadline:
                with contextlib.suppress(OSError):
                    sky.api_cancel(request)
                raise CloudError(
                    f"{what} took longer than {seconds / 60:.0f} minutes and was given up: look at"
                    " `sky api logs`, then run the same command again"
                )
            time.sleep(pause)
            pause = min(1.2 * pause, POLL_SECONDS)
        return sky.get(request)


def _log_of(request: Any) -> str:
    """The last lines that the server wrote about a request which has failed."""
    from sky import exceptions

    lines = io.StringIO()
    with contextlib.suppress(exceptions.ResourcesUnavailableError, OSError, RuntimeError):
        sdk().stream_and_get(request, tail=LOG_LINES, follow=False, output_stream=lines)
    return lines.getvalue()


def _is_over(request: Any) -> bool:
    """Whether the API server has ended the request; not yet, where the connection was lost."""
    try:
        records = sdk().api_status([request])
    except OSError as error:
        log.debug("SkyPilot's API server did not say: %s", error)
        return False
    return not records or records[0].status in ("SUCCEEDED", "FAILED", "CANCELLED")
