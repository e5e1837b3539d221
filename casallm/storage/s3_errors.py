"""What went wrong with a request to S3, as something to repeat or as advice.

Only the error's code is shown: the rest of an answer may hold keys, tokens or signatures.
"""

import os

from casallm.errors import StoreError, StoreExistsError, StoreNotFoundError
from casallm.storage.retry import TransientError

_CREDENTIALS = {
    "AuthorizationHeaderMalformed", "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId",
    "InvalidToken", "RequestExpired", "SignatureDoesNotMatch", "TokenRefreshRequired",
}  # fmt: skip
_TRANSIENT = {
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError",
    "MalformedXML", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown",
    "Throttling", "ThrottlingException", "XAmzContentSHA256Mismatch",
}  # fmt: skip


class UploadGoneError(Exception):
    """The multipart upload is not open any more: completed, or aborted by somebody."""


def request_errors() -> tuple[type[Exception], ...]:
    """Every kind of error that a request through aiobotocore can end with."""
    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return ClientError, BotoCoreError, ResponseParserError, aiohttp.ClientError, OSError


def translate(error: Exception, where: str) -> Exception:
    """The exception to raise for `error`, which a request about the URL `where` ended with."""
    from botocore.exceptions import (
        ClientError,
        CredentialRetrievalError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
        ProfileNotFound,
    )

    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _from_answer(code, status, where)
    if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
        return StoreError(
            f"no AWS credentials were found for {where}: set AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or run `aws configure`"
        )
    if isinstance(error, CredentialRetrievalError):
        return StoreError(
            f"AWS credentials for {where} could not be obtained from {_source()}: renew them, with"
            " `aws sso login` or by a new key"
        )
    if isinstance(error, ParamValidationError):
        return StoreError(f"{where} is not a valid S3 address: write it as s3://BUCKET/NAME")
    if isinstance(error, TimeoutError):
        return TransientError("no answer in time")
    return TransientError(type(error).__name__)


def _from_answer(code: str, status: int, where: str) -> Exception:
    bucket = "/".join(where.split("/")[:3])
    if code == "NoSuchBucket":
        return StoreError(
            f"there is no bucket {bucket}: create it (`aws s3 mb {bucket}`) or check its name and"
            " AWS_ENDPOINT_URL"
        )
    if code == "NoSuchUpload":
        return UploadGoneError(f"the upload of {where} was ended by somebody else")
    if code == "PreconditionFailed" or status == 412:
        return StoreExistsError(f"{where} exists already")
    if code in _CREDENTIALS:
        return StoreError(
            f"{bucket} does not accept the credentials from {_source()} ({code}): renew them, then"
            " run the same command again"
        )
    if code == "RequestTimeTooSkewed":
        return StoreError(
            f"{bucket} refuses requests because this machine's clock is wrong: set it"
        )
    if code in _TRANSIENT or status >= 500 or status in (409, 429):
        return TransientError(code or f"status {status}")
    if status == 404:
        return StoreNotFoundError(f"there is no {where}")
    if status == 403:
        return StoreError(
            f"access to {where} is denied ({code}): renew the credentials from {_source()} if they"
            " are old, or give them the rights s3:ListBucket, s3:GetObject, s3:PutObject and"
            f" s3:DeleteObject on {bucket}"
        )
    return StoreError(f"{bucket} refused a request about {where} ({code or status})")


def _source() -> str:
    """Where the AWS libraries take the credentials from, in words."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return "the variables AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if os.environ.get("AWS_PROFILE"):
        return f"the profile {os.environ['AWS_PROFILE']}"
    return "~/.aws or the role of this machine"
