"""Data sets of the Hugging Face hub by name: which files they are, at a pinned revision.

`owner/name[@revision][:configuration][:split][:column]`, or a short name. One request lists a
repository: its commit, the size and hash of every file, and the card that says which files make up
which configuration and split. Files are then read in parts as they lie at that commit, so nothing
that changes there later mixes in. The hub is where HF_ENDPOINT says; HF_TOKEN, or a login, opens
what is gated. No code of a data set is ever run.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from casallm.config import nearest
from casallm.data.deadline import within
from casallm.data.documents import FORMATS, format_of
from casallm.data.manifest import Split
from casallm.data.rows import HUB_URL
from casallm.data.web import WebFile
from casallm.errors import DataError, MissingExtraError
from casallm.storage.retry import Patience, TransientError

SHORT_NAMES = {
    "fineweb-edu": "HuggingFaceFW/fineweb-edu:sample-10BT",
    "climbmix": "karpathy/climbmix-400b-shuffle",
}
"""What a name without an owner stands for; what follows it replaces what follows here."""

LISTING_SECONDS = 20.0
"""A list of files is waited for this long."""

PATIENCE = Patience(tries=5)

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:[\w.-]*){0,3}")
_VALIDATION = ("validation", "valid", "val", "dev")
_KEYWORD = re.compile(r"(?:^|[-._/ ])(train|test|validation|valid|val|dev)(?:$|[-._/ 0-9])", re.I)


@dataclass(frozen=True)
class HubName:
    """What a person asked for; empty: what the data set says."""

    repository: str
    revision: str | None = None
    configuration: str = ""
    split: str = ""
    column: str = ""


@dataclass(frozen=True)
class HubFile:
    """One file of a repository at a commit."""

    path: str
    n_bytes: int
    sha256: str
    """Of its content, or, where it is small, git's hash of it."""


@dataclass(frozen=True)
class HubSet:
    """The files of one configuration, by the split that they belong to; None: held out by hash."""

    name: HubName
    commit: str
    files: tuple[tuple[Split | None, HubFile], ...]

    def open(self, file: HubFile) -> WebFile:
        """The file as it lies at the commit."""
        path = f"datasets/{self.name.repository}/resolve/{self.commit}/{quote(file.path)}"
        return WebFile(f"{endpoint()}/{path}", file.n_bytes, urlsplit(endpoint()).netloc)


def endpoint() -> str:
    """Where the hub is: HF_ENDPOINT, or huggingface.co."""
    return os.environ.get("HF_ENDPOINT", HUB_URL).rstrip("/")


def parse_hub_name(text: str) -> HubName | None:
    """The name of a data set that `text` is; None if it is none."""
    short, _, rest = text.partition(":")
    if short in SHORT_NAMES:
        known, _, configuration = SHORT_NAMES[short].partition(":")
        text = f"{known}:{rest or configuration}"
    if not _NAME.fullmatch(text):
        return None
    place, *parts = text.split(":")
    repository, _, revision = place.partition("@")
    return HubName(repository, revision or None, *parts)


def list_hub(name: HubName) -> HubSet:
    """The files that `name` stands for; DataError if the hub has or gives none."""
    info = PATIENCE.retry(lambda: _ask(name), f"listing {name.repository} on {endpoint()}")
    files = [
        HubFile(each.rfilename, each.size or 0, _hash_of(each))
        for each in info.siblings or []
        if format_of(each.rfilename) is not None
    ]
    if not files:
        raise DataError(
            f"{name.repository} holds no file that ends in {', '.join(FORMATS)}: fetch it with"
            " another program, and name the files"
        )
    card = info.card_data.to_dict() if info.card_data else {}
    splits = _choose_configuration(name, card.get("configs"), files)
    return HubSet(name, info.sha, tuple(_choose_splits(name, splits)))


def _ask(name: HubName) -> Any:
    try:
        import httpx
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise MissingExtraError("huggingface_hub", "data") from None
    where = f"{endpoint()}/datasets/{name.repository}"
    api = huggingface_hub.HfApi(endpoint=endpoint())
    try:
        return within(
            LISTING_SECONDS,
            lambda: api.dataset_info(name.repository, revision=name.revision, files_metadata=True),
        )
    except errors.GatedRepoError:
        raise DataError(
            f"{name.repository} is open only to those who accept its terms: accept them at {where},"
            " and set HF_TOKEN to a token of yours"
        ) from None
    except errors.RevisionNotFoundError:
        raise DataError(f"{where} has no revision {name.revision!r}: check it there") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 429 or status >= 500:
            raise TransientError(f"status {status}") from None
        raise DataError(
            f"there is no file or directory {name.repository!r} here, and no data set of that name"
            f" at {endpoint()} that may be read without another token ({status}): check the name,"
            " or set HF_TOKEN"
        ) from None
    except (httpx.HTTPError, OSError) as error:
        raise DataError(
            f"{name.repository} is no file or directory here, and {endpoint()} cannot be reached to"
            f" look for it there ({type(error).__name__}): check the path and the network, or use"
            " builtin"
        ) from None


def _hash_of(sibling: Any) -> str:
    return str(sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)


def _choose_configuration(
    name: HubName, configs: list[dict[str, Any]] | None, files: list[HubFile]
) -> dict[str, list[HubFile]]:
    """The files of each split of the configuration that is asked for, or of the usual one."""
    if not configs:
        if name.configuration not in ("", "default"):
            raise DataError(f"{name.repository} has no configurations: leave that part empty")
        return _splits_by_name(files)
    known = {str(each.get("config_name", "default")): each for each in configs}
    marked = [key for key, each in known.items() if each.get("default")]
    usual = [*marked, *(key for key in known if key == "default"), *known]
    chosen = name.configuration or (usual[0] if marked or "default" in known else "")
    if not chosen and len(known) == 1:
        chosen = usual[0]
    if chosen not in known:
        asked = f"no configuration {chosen!r}{nearest(chosen, known)}" if chosen else "several"
        raise DataError(
            f"{name.repository} has {asked} (configurations: {', '.join(known)}): name one, as in"
            f" {name.repository}:{next(iter(known))}"
        )
    splits = _splits_by_pattern(known[chosen].get("data_files"), files)
    return splits or _splits_by_name(files)


def _splits_by_pattern(data_files: Any, files: list[HubFile]) -> dict[str, list[HubFile]]:
    """What `data_files` of a card says, in any of the ways in which it may be written."""
    if isinstance(data_files, str):
        data_files = [{"split": "train", "path": data_files}]
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    splits: dict[str, list[HubFile]] = {}
    for entry in data_files or []:
        part = entry if isinstance(entry, Mapping) else {"split": "train", "path": entry}
        paths = part["path"] if isinstance(part["path"], list) else [part["path"]]
        patterns = [_glob(str(path)) for path in paths]
        splits.setdefault(str(part.get("split", "train")), []).extend(
            file for file in files if any(each.fullmatch(file.path) for each in patterns)
        )
    return splits


def _splits_by_name(files: Iterable[HubFile]) -> dict[str, list[HubFile]]:
    """Splits by the words in the paths, as the hub itself does without a card."""
    splits: dict[str, list[HubFile]] = {}
    for file in files:
        found = _KEYWORD.search(file.path)
        splits.setdefault(found[1].lower() if found else "train", []).append(file)
    return splits


def _choose_splits(
    name: HubName, splits: dict[str, list[HubFile]]
) -> list[tuple[Split | None, HubFile]]:
    """The split asked for, held out of by hash; else train, with the set's own validation part."""
    if name.split or len(splits) == 1:
        chosen = name.split or next(iter(splits))
        if chosen not in splits:
            raise DataError(
                f"{name.repository} has no split {chosen!r}{nearest(chosen, splits)} (splits:"
                f" {', '.join(splits)})"
            )
        return [(None, file) for file in splits[chosen]]
    if "train" not in splits:
        raise DataError(
            f"{name.repository} has the splits {', '.join(splits)}: name one, as in"
            f" {name.repository}:{name.configuration}:{next(iter(splits))}"
        )
    held_out = next((split for split in _VALIDATION if split in splits), None)
    if held_out is None:
        return [(None, file) for file in splits["train"]]
    return [
        *(("train", file) for file in splits["train"]),
        *(("val", file) for file in splits[held_out]),
    ]


def _glob(pattern: str) -> re.Pattern[str]:
    """A card's pattern: `*` and `?` stay within a folder, `**` does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meanings.get(part, re.escape(part)) for part in parts))
