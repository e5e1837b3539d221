"""The machinery of configuration: YAML and `section.key=value` into frozen, checked models.

No field lives here: each `XConfig` lives in the module it configures and derives from `Config`.
Layers of settings are merged in order (preset, file, command line) and validated once, so that
every mistake is reported together, with its full path and the nearest valid name. Scalars are
read by the type of their field: `3e-4` is a number and `no` is text or False as the field says.
"""

import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from casallm.errors import ConfigError

Tree = dict[str, Any]


class Config(BaseModel):
    """A frozen group of settings; the docstring beneath each field says its unit and source."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


C = TypeVar("C", bound=Config)


def load_yaml(path: Path) -> Tree:
    """The mapping in a YAML file, every scalar left as the text that was written."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text ({error}): check the file") from None
    return parse_yaml(text, where=str(path))


def parse_yaml(text: str, *, where: str) -> Tree:
    """The mapping in YAML `text`, every scalar left as text; `where` names it in errors."""
    try:
        tree = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None or tree == "":
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} must hold `key: value` lines, not {type(tree).__name__}")
    return tree


def parse_overrides(assignments: Iterable[str]) -> Tree:
    """A tree from `section.key=value` arguments; a later one wins."""
    tree: Tree = {}
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"{assignment!r} is not a setting: write it as section.key=value")
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{assignment!r} sets a key beneath {key!r}, which has a value")
        node[keys[-1]] = _parse_value(value, assignment)
    return tree


def merge(*trees: Mapping[str, Any]) -> Tree:
    """The trees laid over each other, later ones on top; sections merge, values replace."""
    merged: Tree = {}
    for tree in trees:
        for key, value in tree.items():
            below = merged.get(key)
            if isinstance(value, Mapping):
                merged[key] = merge(below if isinstance(below, dict) else {}, value)
            else:
                merged[key] = value
    return merged


def build(config_class: type[C], tree: Mapping[str, Any], *, where: str = "settings") -> C:
    """`tree` as a checked `config_class`; every mistake in it is one ConfigError, all at once."""
    typed = _typed(config_class, tree)
    try:
        return config_class.model_validate(typed)
    except ValidationError as error:
        problems = [_describe(config_class, dict(detail)) for detail in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(problems)) from None


def to_tree(config: Config) -> Tree:
    """`config` as plain values, fit for YAML, JSON and hashing."""
    return config.model_dump(mode="json")


def to_yaml(tree: Mapping[str, Any]) -> str:
    """`tree` as YAML text that `parse_yaml` and `build` read back to equal values."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, width=100)


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_of(value: Any) -> str:
    """The lower-case sha256 of `value`'s canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def nearest(name: str, names: Iterable[str]) -> str:
    """`, did you mean X?` for the closest of `names`, or nothing."""
    known = list(names)
    folded = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    return f", did you mean {folded[close[0]]}?" if close else ""


def _parse_value(text: str, assignment: str) -> Any:
    if text[:1] not in ("[", "{"):
        return text
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        raise ConfigError(f"{assignment!r} has a list or mapping that does not close") from None


def _typed(config_class: type[Config], tree: Mapping[str, Any]) -> Tree:
    """`tree` with its text scalars read by the types of their fields."""
    typed: Tree = {}
    for key, value in tree.items():
        field = config_class.model_fields.get(key)
        typed[key] = value if field is None else _read(value, field.annotation)
    return typed


def _read(value: Any, annotation: Any) -> Any:
    options = _options(annotation)
    section = next((each for each in options if _is_config(each)), None)
    if section is not None and isinstance(value, Mapping):
        return _typed(section, value)
    if isinstance(value, list):
        inner = [arg for each in options for arg in typing.get_args(each) if arg is not Ellipsis]
        items = [_read(item, inner[0]) if inner else item for item in value]
        is_tuple = any(typing.get_origin(each) is tuple for each in options)
        return tuple(items) if is_tuple else items
    if not isinstance(value, str):
        return value
    if types.NoneType in options and value.lower() in ("null", "none", "~", ""):
        return None
    if int in options and float not in options:
        return _whole(value)
    return value


def _whole(text: str) -> Any:
    """`text` as an int where it is one in any usual spelling (1_000, 1e6); else unchanged."""
    try:
        number = float(text.replace("_", ""))
        return int(number) if number.is_integer() else text
    except (ValueError, OverflowError):
        return text


def _options(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        return _options(typing.get_args(annotation)[0])
    return (annotation,)


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _describe(config_class: type[Config], detail: Mapping[str, Any]) -> str:
    location = [str(part) for part in detail["loc"]]
    path = ".".join(location)
    if detail["type"] == "extra_forbidden":
        owner, prefix = _owner(config_class, location[:-1])
        names = list(owner.model_fields) if owner else []
        where = "".join(f"{part}." for part in prefix)
        hint = nearest(location[-1], names).replace("mean ", f"mean {where}")
        known = f" (known in {where.rstrip('.') or 'settings'}: {', '.join(names)})"
        return f"there is no setting {path}{hint or known}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "missing":
        return f"{path} is required"
    shown = detail.get("input")
    where = f"{path} is {shown!r}: " if path and not isinstance(shown, Mapping) else ""
    return f"{where}{message[:1].lower()}{message[1:]}"


def _owner(
    config_class: type[Config], location: list[str]
) -> tuple[type[Config] | None, list[str]]:
    owner: type[Config] | None = config_class
    for part in location:
        if part.isdigit():
            continue
        field = owner.model_fields.get(part) if owner else None
        options = _options(field.annotation) if field else ()
        inner = [arg for option in options for arg in typing.get_args(option)]
        owner = next((each for each in (*options, *inner) if _is_config(each)), None)
    return owner, location
