"""Who owns a simulated cloud, so that what a killed test left behind is cleared and nothing else.

A cloud is a folder of its own (pytest would delete the fourth oldest of its own), and the file
`owner` in it names the process that started it. Everything started for it carries the folder in
its environment. A folder whose owner is gone is cleared by whoever starts the next cloud.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

PREFIX = "casallm-cloud-"
MARK = "SIMCLOUD_MARK"
UNCLAIMED_SECONDS = 600.0
"""How long a folder may be without an owner before it counts as left behind."""


def claim() -> Path:
    """A new folder of this process's own, after what dead processes left has been cleared."""
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    owner = {"pid": os.getpid(), "started": started(os.getpid())}
    (folder / "owner").write_text(json.dumps(owner))
    return folder


def sweep() -> None:
    """Clear every cloud whose owner is gone; those of other users are left to them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.geteuid() and not _is_owned(folder):
                clear(folder)


def clear(folder: Path) -> None:
    """End every process of the cloud in `folder`, and delete what it has on this machine."""
    for pid in marked(folder):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        user = (folder / "home" / ".sky" / "user_hash").read_text().strip()
        shutil.rmtree(f"/tmp/sky_ssh_{user}", ignore_errors=True)  # SkyPilot asks nobody where
    with contextlib.suppress(OSError):
        network = (folder / "network").read_text()
        subprocess.run(["ip", "netns", "del", network], check=False, stderr=subprocess.DEVNULL)
    with contextlib.suppress(OSError):
        shutil.rmtree((folder / "nodes").resolve(), ignore_errors=True)
    if os.environ.get("SIMCLOUD_KEEP"):
        shutil.move(folder, folder.with_name(f"kept-{folder.name}"))
        return
    for _ in range(20):  # a process that dies may still write
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def marked(folder: Path) -> list[int]:
    """Every process on this machine (those on nodes excepted) that belongs to the cloud.

    By its environment, or by where its output goes: a worker of SkyPilot's that renames itself
    writes over its environment.
    """
    mark, below = f"{MARK}={folder}".encode(), f"{folder}/"
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and place.name != str(os.getpid()):
            with contextlib.suppress(OSError):
                is_marked = mark in (place / "environ").read_bytes().split(b"\0")
                if is_marked or str((place / "fd/1").readlink()).startswith(below):
                    found.append(int(place.name))
    return found


def started(pid: int | str) -> str:
    """When a process was started, in ticks: with its number it is told from all others."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]


def _is_owned(folder: Path) -> bool:
    try:
        owner = json.loads((folder / "owner").read_text())
    except (OSError, ValueError):
        return time.time() - folder.stat().st_mtime < UNCLAIMED_SECONDS
    try:
        return started(owner["pid"]) == owner["started"]
    except OSError:
        return False
