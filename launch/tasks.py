"""Read `tasks/<job>.yaml` and lay what was decided over it; no task is made up here.

The files are SkyPilot tasks that work by hand. The launcher narrows their resources to the
machines of the plan, and fills in their `envs` and `secrets`; it adds no command.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from casallm.config import nearest
from casallm.errors import ConfigError
from casallm.estimate.hardware import Hardware, parse_gpu

Tree = dict[str, Any]

CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Place:
    """One kind of machine in one place that a task may run on, in order of preference."""

    infra: str
    """`aws/us-east-1` or `aws`."""
    accelerators: str
    """`A100:8`."""
    max_hourly_usd: float
    """Listed dollars an hour of one machine beyond which SkyPilot does not take it."""


@dataclass(frozen=True)
class Overrides:
    """What the launcher decides about a task; empty leaves the file's own value."""

    name: str
    nodes: int = 1
    is_spot: bool = False
    places: Sequence[Place] = ()
    max_hourly_usd: float | None = None
    """The same, of a task without places."""
    labels: Mapping[str, str] = field(default_factory=dict)
    envs: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


def load_task(job: str) -> Tree:
    """The task of `job` as its file says it."""
    path = CHECKOUT / "tasks" / f"{job}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = sorted(each.stem for each in path.parent.glob("*.yaml"))
        raise ConfigError(
            f"there is no task {path}{nearest(job, known)}: launch from a checkout of casallm"
        ) from None
    return dict(yaml.safe_load(text))


def accelerators_of(task: Tree) -> list[tuple[Hardware, int]]:
    """The GPUs that the task names as its candidates, in the order of the file."""
    found = []
    for candidate in task["resources"].get("any_of", [task["resources"]]):
        if candidate.get("accelerators"):
            found.append(parse_gpu(str(candidate["accelerators"])))
    return found


def override(task: Tree, changes: Overrides) -> Tree:
    """`task` with the changes laid over it; ConfigError for a variable that it does not have."""
    changed = copy.deepcopy(task)
    changed["name"] = changes.name
    changed["workdir"] = str(CHECKOUT)
    changed["num_nodes"] = changes.nodes
    _set_known(changed, "envs", changes.envs)
    _set_known(changed, "secrets", changes.secrets)
    resources = changed["resources"]
    resources["use_spot"] = changes.is_spot
    resources["labels"] = {**resources.get("labels", {}), **changes.labels}
    if changes.nodes > 1:
        resources["network_tier"] = "best"
    if changes.max_hourly_usd is not None:
        resources["max_hourly_cost"] = changes.max_hourly_usd
    if changes.places:
        resources.pop("any_of", None)
        resources["ordered"] = [_resources_of(place) for place in changes.places]
    return changed


def _resources_of(place: Place) -> Tree:
    return {
        "infra": place.infra,
        "accelerators": place.accelerators,
        "max_hourly_cost": place.max_hourly_usd,
    }


def _set_known(task: Tree, section: str, values: Mapping[str, str]) -> None:
    known = task.get(section, {})
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ConfigError(
            f"the task {task['name']} has no {section} {', '.join(unknown)}"
            f"{nearest(unknown[0], known)} (known: {', '.join(known)})"
        )
    task[section] = {**known, **values}
