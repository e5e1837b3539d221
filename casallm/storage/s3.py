"""Amazon S3 and everything that speaks its protocol (R2, MinIO, CoreWeave, Nebius, moto …).

Requests are made through s3fs, which brings the event loop, the credentials, AWS_ENDPOINT_URL and
the region; its own retries are off, so that there is one place that repeats (`retry`). Uploads are
one PUT or an explicit multipart upload that is aborted on any error: s3fs's `open(…, "wb")` would
publish a truncated object. Every part carries its MD5, which S3 checks on arrival, and the ETag
that comes back is compared with it, since some servers do not check.
"""

import base64
import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import fsspec.asyn

from casallm.errors import MissingExtraError, StoreError, StoreNotFoundError
from casallm.storage.bucket import PART_BYTES, Source, Stat, in_parallel, ranges
from casallm.storage.entry import Entry
from casallm.storage.retry import Patience, TransientError
from casallm.storage.s3_errors import UploadGoneError, request_errors, translate

MAX_PARTS = 10_000
"""Parts of one upload that S3 allows: docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html"""

_NEXT_PAGE = {
    "list_objects_v2": {"ContinuationToken": "NextContinuationToken"},
    "list_multipart_uploads": {
        "KeyMarker": "NextKeyMarker",
        "UploadIdMarker": "NextUploadIdMarker",
    },
}
"""What a listing is asked for next, and where its last page says it."""


class S3Bucket:
    """One S3 bucket, at AWS_ENDPOINT_URL unless `endpoint_url` says otherwise."""

    def __init__(
        self, name: str, *, endpoint_url: str | None = None, patience: Patience | None = None
    ) -> None:
        self.url = f"s3://{name}"
        self._name = name
        self._patience = patience or Patience()
        self._fs = _connect(self._patience, endpoint_url)

    def stat(self, key: str) -> Stat:
        """The size of `key`, and its MD5 unless it was uploaded in parts or encrypted by KMS."""
        answer = self._request("head_object", Key=key)
        return Stat(answer["ContentLength"], _md5_of_etag(answer))

    def fetch(self, key: str, begin: int, end: int) -> bytes:
        """The bytes of `key` from `begin` to `end`."""
        span = f"bytes={begin}-{end - 1}"
        return self._request("get_object", n_bytes=end - begin, Key=key, Range=span)["Body"]

    def upload(self, key: str, source: Source) -> bool:
        """Replace `key` in one PUT, or in parts that nobody sees before they are complete."""
        if source.n_bytes < 2 * PART_BYTES:
            data = source.read(0, source.n_bytes)
            answer = self._put("put_object", data, Key=key)
            return _is_confirmed(answer, data)
        return self._patience.retry(
            lambda: self._upload_parts(key, source), f"uploading {self.url}/{key}"
        )

    def create(self, key: str, data: bytes) -> bool:
        """Make `key` by a PUT with If-None-Match; StoreExistsError if it exists."""
        answer = self._put("put_object", data, Key=key, IfNoneMatch="*")
        return _is_confirmed(answer, data)

    def scan(self, prefix: str) -> list[Entry]:
        """All objects whose key begins with `prefix`, page by page."""
        return [
            Entry(item["Key"], item["Size"], str(item.get("ETag", "")).strip('"'))
            for page in self._pages("list_objects_v2", Prefix=prefix)
            for item in page.get("Contents", [])
        ]

    def remove(self, key: str) -> None:
        """Delete `key`; S3 does not mind if it is missing."""
        self._request("delete_object", Key=key)

    def discard_unfinished(self, prefix: str, is_stale: Callable[[str], bool]) -> int:
        """Abort the open multipart uploads below `prefix` whose key is stale; how many."""
        try:
            pages = list(self._pages("list_multipart_uploads", Prefix=prefix))
        except UploadGoneError:  # rclone says so where there are none
            return 0
        open_uploads = [upload for page in pages for upload in page.get("Uploads", [])]
        uploads = [upload for upload in open_uploads if is_stale(upload["Key"])]
        for upload in uploads:
            with contextlib.suppress(UploadGoneError):
                self._request(
                    "abort_multipart_upload", Key=upload["Key"], UploadId=upload["UploadId"]
                )
        return len(uploads)

    def _upload_parts(self, key: str, source: Source) -> bool:
        """Upload in parts; nobody sees any before all are there, and an error leaves none."""
        upload_id = self._request("create_multipart_upload", Key=key)["UploadId"]
        part_bytes = max(PART_BYTES, -(-source.n_bytes // MAX_PARTS))

        def send(part: tuple[int, tuple[int, int]]) -> tuple[dict[str, Any], bool]:
            number, (begin, end) = part
            data = source.read(begin, end)
            answer = self._put("upload_part", data, Key=key, UploadId=upload_id, PartNumber=number)
            return {"PartNumber": number, "ETag": answer["ETag"]}, _is_confirmed(answer, data)

        try:
            sent = list(in_parallel(send, enumerate(ranges(source.n_bytes, part_bytes), start=1)))
            is_acknowledged = self._complete(key, upload_id, [part for part, _ in sent])
        except UploadGoneError as error:
            raise TransientError(str(error)) from None
        except BaseException:
            with contextlib.suppress(StoreError, TransientError, UploadGoneError):
                self._once("abort_multipart_upload", Key=key, UploadId=upload_id)
            raise
        return is_acknowledged and all(is_confirmed for _, is_confirmed in sent)

    def _complete(self, key: str, upload_id: str, parts: list[dict[str, Any]]) -> bool:
        """Publish the parts; False if a try whose answer was lost may have done so."""
        try:
            self._request(
                "complete_multipart_upload",
                Key=key,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
            )
        except UploadGoneError:
            with contextlib.suppress(StoreNotFoundError):
                self.stat(key)
                return False
            raise
        return True

    def _put(self, method: str, data: bytes, **arguments: Any) -> dict[str, Any]:
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        return self._request(method, n_bytes=len(data), Body=data, ContentMD5=md5, **arguments)

    def _pages(self, method: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        while True:
            page = self._request(method, **arguments)
            yield page
            if not page.get("IsTruncated"):
                return
            for argument, field in _NEXT_PAGE[method].items():
                arguments[argument] = page[field]

    def _request(self, method: str, *, n_bytes: int = 0, **arguments: Any) -> dict[str, Any]:
        """The answer to one request, repeated while it may help."""
        where = f"{self.url}/{arguments.get('Key', arguments.get('Prefix', ''))}"
        return self._patience.retry(
            lambda: self._once(method, n_bytes=n_bytes, **arguments),
            f"{method.replace('_', ' ')} of {where}",
        )

    def _once(self, method: str, *, n_bytes: int = 0, **arguments: Any) -> dict[str, Any]:
        try:
            return fsspec.asyn.sync(
                self._fs.loop,
                self._call,
                method,
                arguments,
                timeout=self._patience.limit_seconds(n_bytes),
            )
        except request_errors() as error:
            where = f"{self.url}/{arguments.get('Key', arguments.get('Prefix', ''))}"
            raise translate(error, where) from None

    async def _call(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        await self._fs.set_session()
        client = await self._fs.get_s3(self._name)
        answer = await getattr(client, method)(Bucket=self._name, **arguments)
        if "Body" in answer:
            async with answer["Body"] as stream:
                answer["Body"] = await stream.read()
        return answer


def _connect(patience: Patience, endpoint_url: str | None) -> Any:
    try:
        import s3fs
    except ImportError:
        raise MissingExtraError("s3fs", "train") from None
    config = {
        "connect_timeout": min(10.0, patience.request_seconds),
        "read_timeout": patience.request_seconds,
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    # Named here, because s3fs gives the connection that it has to whoever asks in the same words.
    endpoint_url = endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3")
    endpoint_url = endpoint_url or os.environ.get("AWS_ENDPOINT_URL")
    return s3fs.S3FileSystem(endpoint_url=endpoint_url, config_kwargs=config)


def _md5_of_etag(answer: dict[str, Any]) -> str | None:
    """The MD5 that an ETag is: of an object in one part, and not encrypted by KMS."""
    etag = str(answer.get("ETag", "")).strip('"')
    return etag if re.fullmatch(r"[0-9a-f]{32}", etag) else None


def _is_confirmed(answer: dict[str, Any], data: bytes) -> bool:
    return _md5_of_etag(answer) == hashlib.md5(data, usedforsecurity=False).hexdigest()
