"""Any object store that fsspec speaks (gs://, az://, …), through its one-call operations.

`pipe_file` either publishes the whole object or nothing, and with `mode="create"` only where there
is none (gcsfs: a generation precondition). The content is confirmed by reading it back, which
`RemoteStore` does, since fsspec has no common way to ask a store for a checksum.
"""

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem

from casallm.errors import MissingExtraError, StoreError, StoreExistsError, StoreNotFoundError
from casallm.storage.bucket import Source, Stat
from casallm.storage.entry import Entry
from casallm.storage.retry import Patience, TransientError

T = TypeVar("T")

_EXTRAS = {"gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "az": ("adlfs", "azure"),
           "abfs": ("adlfs", "azure"), "abfss": ("adlfs", "azure")}  # fmt: skip
"""The package and the extra of casallm that a scheme needs."""

_OWN_ERRORS = {
    "gcsfs": ("gcsfs.retry", "HttpError"),
    "adlfs": ("azure.core.exceptions", "AzureError"),
}
"""The error that a package raises for an answer it does not understand."""


class FileSystemBucket:
    """One bucket or container of an fsspec file system."""

    def __init__(self, scheme: str, name: str, patience: Patience | None = None) -> None:
        self.url = f"{scheme}://{name}"
        self._name = name
        self._patience = patience or Patience()
        package, extra = _EXTRAS.get(scheme, (scheme, "train"))
        try:
            self._fs: Any = fsspec.filesystem(scheme, use_listings_cache=False)
        except ImportError:
            raise MissingExtraError(package, extra) from None
        except ValueError:
            raise StoreError(
                f"{scheme}:// is no kind of store: use s3://, gs:// or a path"
            ) from None
        self._errors = _errors_of(package)

    def stat(self, key: str) -> Stat:
        """The size of `key`."""
        info = self._request(key, 0, lambda limit: self._fs.info(self._path(key), **limit))
        if info["type"] != "file":
            raise StoreNotFoundError(f"there is no {self.url}/{key}")
        return Stat(info["size"], None)

    def fetch(self, key: str, begin: int, end: int) -> bytes:
        """The bytes of `key` from `begin` to `end`."""
        return self._request(
            key,
            end - begin,
            lambda limit: self._fs.cat_file(self._path(key), start=begin, end=end, **limit),
        )

    def upload(self, key: str, source: Source) -> bool:
        """Replace `key` in one call; never confirmed."""
        data = source.read(0, source.n_bytes)
        self._request(
            key, len(data), lambda limit: self._fs.pipe_file(self._path(key), data, **limit)
        )
        return False

    def create(self, key: str, data: bytes) -> bool:
        """Make `key`, StoreExistsError if it exists; never confirmed."""
        self._request(
            key,
            len(data),
            lambda limit: self._fs.pipe_file(self._path(key), data, mode="create", **limit),
        )
        return False

    def scan(self, prefix: str) -> list[Entry]:
        """All objects whose key begins with `prefix`."""
        folder = prefix.rpartition("/")[0]
        path = self._path(folder) if folder else self._name
        try:
            found = self._request(
                prefix, 0, lambda limit: self._fs.find(path, detail=True, **limit)
            )
        except StoreNotFoundError:
            return []
        entries = [
            Entry(self._key(name), info["size"], str(info.get("etag") or info.get("ETag") or ""))
            for name, info in found.items()
        ]
        return [entry for entry in entries if entry.name.startswith(prefix)]

    def remove(self, key: str) -> None:
        """Delete `key`; missing is fine."""
        try:
            self._request(key, 0, lambda limit: self._fs.rm_file(self._path(key), **limit))
        except StoreNotFoundError:
            return

    def discard_unfinished(self, prefix: str, is_stale: Callable[[str], bool]) -> int:
        """Nothing: these stores forget unfinished uploads by themselves."""
        return 0

    def _path(self, key: str) -> str:
        return f"{self._name}/{key}"

    def _key(self, path: str) -> str:
        return path.lstrip("/").removeprefix(f"{self._name}/")

    def _request(self, key: str, n_bytes: int, request: Callable[[dict[str, float]], T]) -> T:
        """The answer to `request`, which is given its time limit, repeated while it may help."""
        is_async = isinstance(self._fs, AsyncFileSystem)
        limit = {"timeout": self._patience.limit_seconds(n_bytes)} if is_async else {}

        def once() -> T:
            try:
                return request(limit)
            except FileNotFoundError:
                raise StoreNotFoundError(f"there is no {self.url}/{key}") from None
            except FileExistsError:
                raise StoreExistsError(f"{self.url}/{key} exists already") from None
            except self._errors as error:
                if isinstance(error, PermissionError) or "Forbidden" in str(error):
                    raise StoreError(
                        f"access to {self.url}/{key} is denied: check the credentials and their"
                        " rights"
                    ) from None
                raise TransientError(type(error).__name__) from None

        return self._patience.retry(once, f"a request about {self.url}/{key}")


def _errors_of(package: str) -> tuple[type[Exception], ...]:
    if package not in _OWN_ERRORS:
        return (OSError,)
    module, name = _OWN_ERRORS[package]
    return OSError, getattr(importlib.import_module(module), name)
