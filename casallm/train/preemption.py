"""Who may ask a run to stop: signals now, a cloud's notice of reclaim a little before the end.

Everything here only sets a request; ranks read it at a step boundary, agree, save and end.
AWS announces a spot reclaim about 120 s ahead through its instance metadata (IMDSv2: a session
token, then `spot/instance-action`), GCP about 30 s ahead through `instance/preempted`.
"""

import contextlib
import http.client
import logging
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Literal

from casallm.train.control import StopRequest

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEAT_AFTER_SECONDS = 5.0
"""A second signal counts only after this long: launchers like to send two at once."""

POLL_SECONDS = 5.0
"""AWS recommends asking every five seconds."""

AWS_NOTICE_SECONDS = 120.0
GCP_NOTICE_SECONDS = 30.0
METADATA = {
    "aws": ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254"),
    "gcp": ("GCE_METADATA_HOST", "http://metadata.google.internal"),
}
"""The variable by which each cloud's own libraries move its metadata server, and where it is."""


class SignalWatch:
    """Turns the first stop signal into a request, and a later one into `is_impatient`."""

    def __init__(self, on_stop: Callable[[StopRequest], None]) -> None:
        self._on_stop = on_stop
        self._first: float | None = None
        self.is_impatient = False

    def install(self) -> None:
        """Handle the stop signals from here on (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._on_stop(StopRequest(reason=signal.Signals(number).name))
        elif now - self._first >= REPEAT_AFTER_SECONDS:
            self.is_impatient = True


@contextlib.contextmanager
def heed_notices(
    cloud: Literal["off", "aws", "gcp"], on_stop: Callable[[StopRequest], None]
) -> Iterator[None]:
    """Listen to the cloud for as long as this lasts, if it is said which."""
    if cloud == "off":
        yield
        return
    done = watch_notices(cloud, on_stop)
    try:
        yield
    finally:
        done.set()


def watch_notices(
    cloud: Literal["aws", "gcp"],
    on_stop: Callable[[StopRequest], None],
    *,
    poll_seconds: float = POLL_SECONDS,
) -> threading.Event:
    """Ask the cloud's metadata server in the background; set the returned event to stop asking."""
    done = threading.Event()
    ask = _aws_notice if cloud == "aws" else _gcp_notice
    variable, usual = METADATA[cloud]
    base = os.environ.get(variable, usual).rstrip("/")
    base = base if "://" in base else f"http://{base}"

    def poll() -> None:
        while not done.wait(poll_seconds):
            request = ask(base)
            if request is not None:
                on_stop(request)
                return

    threading.Thread(target=poll, name="preemption-notices", daemon=True).start()
    return done


def _aws_notice(base: str) -> StopRequest | None:
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _fetch(f"{base}/latest/api/token", ttl, method="PUT")
    if token is None:
        return None
    header = {"X-aws-ec2-metadata-token": token}
    action = _fetch(f"{base}/latest/meta-data/spot/instance-action", header)
    return None if action is None else _notice("AWS spot notice", AWS_NOTICE_SECONDS)


def _gcp_notice(base: str) -> StopRequest | None:
    header = {"Metadata-Flavor": "Google"}
    answer = _fetch(f"{base}/computeMetadata/v1/instance/preempted", header)
    is_preempted = answer is not None and answer.strip().upper() == "TRUE"
    return _notice("GCP preemption notice", GCP_NOTICE_SECONDS) if is_preempted else None


def _notice(reason: str, seconds: float) -> StopRequest:
    return StopRequest(reason, time.time() + seconds)


def _fetch(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """The body at `url`, or None when nobody answers or there is no such page."""
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=2) as response:
            return str(response.read().decode("utf-8", "replace"))
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return None
