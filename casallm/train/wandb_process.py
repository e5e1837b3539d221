"""The process that talks to wandb: the only module that imports it.

Started by `wandb_mirror`. The first line of standard input is a MirrorSetup, every other one a
line of metrics; the end of the input (also that of a trainer that was killed) ends it. On
standard output it says, one line each, "info ..." or "warning ...", what people should hear. It
lives no longer than its trainer, but for the seconds an upload may take.
"""

import contextlib
import json
import netrc
import os
import signal
import socket
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from casallm.train.wandb_mirror import MirrorSetup

PROBE_SECONDS = 3.0
"""How long the server may take to answer anything at all."""

FINISH_SECONDS = 600.0
"""How long an upload may go on after the last line, if nobody ends it."""

DEFAULT_PROJECT = "casallm"
DEFAULT_SERVER = "https://api.wandb.ai"

Level = Literal["info", "warning"]


def main() -> None:
    """Mirror the lines on standard input until it ends."""
    first = sys.stdin.readline()
    if not first:
        return
    setup = MirrorSetup(**json.loads(first))
    _prepare_environment(setup)
    with _time_limit(setup.start_seconds, "wandb did not start in time"):
        run = _start(setup)
    if run is None:
        return
    for row in sys.stdin:
        run.log(json.loads(row))
    with _time_limit(FINISH_SECONDS, "wandb did not finish its upload"):
        run.finish()


def find_obstacle(environment: Mapping[str, str]) -> str | None:
    """What keeps a run from being online, in a few words; None if nothing does."""
    server = environment.get("WANDB_BASE_URL") or DEFAULT_SERVER
    if not _has_key(server, environment):
        return "no key was found (set WANDB_API_KEY, or run `wandb login`)"
    if not _answers(server):
        return f"{urlsplit(server).hostname} does not answer"
    return None


def _start(setup: MirrorSetup) -> Any | None:
    """wandb's run: online if wanted and possible, else offline, else None."""
    mode: Literal["offline", "online"] = "offline"
    if setup.mode != "offline":
        obstacle = find_obstacle(os.environ)
        mode = "offline" if obstacle else "online"
        if obstacle:
            level: Level = "warning" if setup.mode == "online" else "info"
            _say(level, f"wandb is offline, {obstacle}: its files are in {setup.directory}")
    try:
        import wandb
    except ImportError:
        _say("info", "metrics are not mirrored: wandb is not installed")
        return None
    try:
        return _init(wandb, setup, mode)
    except (wandb.Error, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
    try:
        wandb.teardown()  # without it, wandb holds that the id is in use
        run = _init(wandb, setup, "offline")
    except (wandb.Error, OSError, ValueError, AssertionError) as error:
        _say("warning", f"metrics are not mirrored to wandb: {' '.join(str(error).split())}")
        return None
    _say("warning", f"wandb is offline, {reason}: its files are in {setup.directory}")
    return run


def _init(wandb: Any, setup: MirrorSetup, mode: Literal["offline", "online"]) -> Any:
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT),
        id=setup.run_id,
        name=setup.name,
        resume="allow" if mode == "online" else None,
        config=setup.config,
        dir=setup.directory,
        mode=mode,
        settings=wandb.Settings(
            console="off",
            silent=True,
            init_timeout=setup.start_seconds,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,  # it would hold the command line
            x_stats_pid=os.getppid(),
        ),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    if mode == "online":
        _say("info", f"metrics are mirrored to {run.url}")
    return run


def _prepare_environment(setup: MirrorSetup) -> None:
    """Keep wandb's own files beneath the run's, and its crash reports at home."""
    scratch = Path(setup.directory)
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    os.environ.setdefault("WANDB_CACHE_DIR", str(scratch / "cache"))
    os.environ.setdefault("WANDB_DATA_DIR", str(scratch / "data"))


def _has_key(server: str, environment: Mapping[str, str]) -> bool:
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = environment.get("NETRC") or Path(environment.get("HOME", "~")).expanduser() / ".netrc"
    try:
        return netrc.netrc(path).authenticators(urlsplit(server).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _answers(server: str) -> bool:
    """Whether the server says anything within a few seconds, by way of the proxy if one is set."""
    socket.setdefaulttimeout(PROBE_SECONDS)
    try:
        with urllib.request.urlopen(server, timeout=PROBE_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # wandb may know a certificate we do not
    except (OSError, ValueError):
        return False
    finally:
        socket.setdefaulttimeout(None)


@contextlib.contextmanager
def _time_limit(seconds: float, complaint: str) -> Iterator[None]:
    """End this process and its children if what happens inside takes longer."""
    timer = threading.Timer(seconds, _give_up, [complaint])
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


def _give_up(complaint: str) -> None:
    _say("warning", f"{complaint}: metrics are no longer mirrored, metrics.jsonl has them all")
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _say(level: Level, text: str) -> None:
    sys.stdout.write(f"{level} {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
