"""Files on the web, read in parts: by https, and from public addresses only.

A URL that a person or a data set names must not lead into the network of the machine that follows
it, where a cloud's metadata server hands out keys. So a host's name is resolved here, all of its
addresses must be public, the connection goes to an address that was checked, and every redirect is
checked anew. Exempt is one host that the operator has named, such as that of HF_ENDPOINT; it alone
is given the token. Proxies are not used. That the bytes arrive as they were sent is TLS's word.
"""

import functools
import http.client
import ipaddress
import re
import socket
import ssl
import time
from dataclasses import dataclass
from typing import BinaryIO, Literal, NoReturn
from urllib.parse import SplitResult, urljoin, urlsplit

from casallm.data.ranges import open_ranges
from casallm.errors import DataError
from casallm.storage.retry import Patience, TransientError

REDIRECTS = 5
LONGEST_WAIT_SECONDS = 60.0
"""The longest `Retry-After` that is obeyed before asking again."""

PATIENCE = Patience()

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class WebFile:
    """A file at a URL; opened, it is read in parts."""

    url: str
    n_bytes: int
    trusted: str = ""
    """`host:port` that may have any address and is given the token; empty: none."""

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of its path."""
        return urlsplit(self.url).path.rpartition("/")[2]

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """Open it for reading."""
        return open_ranges(self.fetch, self.n_bytes)

    def fetch(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`."""
        answer = _ask(self.url, self.trusted, begin, end)
        if answer.total != self.n_bytes:
            raise DataError(
                f"{self.url} has {answer.total:,} bytes now and had {self.n_bytes:,}: it changed"
                " while it was read, so start again"
            )
        return answer.content


def open_web(url: str, *, trusted: str = "") -> tuple[WebFile, str]:
    """The file at `url`, and what tells its content from another (its ETag, or its date)."""
    parts = urlsplit(url)
    if parts.query or parts.username or parts.password:
        raise DataError(
            f"{parts.scheme}://{parts.hostname}{parts.path} is named with a query or a password,"
            " which would be saved with the data: download it and name the file, or use s3://"
        )
    answer = _ask(url, trusted, 0, 1)
    return WebFile(url, answer.total, trusted), answer.version


def check_address(host: str, port: int) -> str:
    """A public address of `host`; DataError if it has any that is not, or none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise DataError(
            f"{host} has no address here: check the URL and the network, or name local files in"
            " data.source"
        ) from None
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not is_public(address):
            raise DataError(
                f"{host} has the address {address}, which is not public: a source of data may not"
                " lead into the network of this machine; name a file or a bucket instead"
            )
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet at large, also where it wraps another."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if any(each is not None and not is_public(str(each)) for each in inner):
            return False
        if ip.ipv4_mapped:
            return True
    return ip.is_global and not ip.is_multicast


@dataclass(frozen=True)
class _Answer:
    """A part of a file, and what was told about all of it."""

    content: bytes
    total: int
    version: str


def _ask(url: str, trusted: str, begin: int, end: int) -> _Answer:
    return PATIENCE.retry(lambda: _once(url, trusted, begin, end), f"reading {url}")


def _once(url: str, trusted: str, begin: int, end: int) -> _Answer:
    """One request for a part, redirects followed; TransientError if it may go better next time."""
    deadline = time.monotonic() + PATIENCE.limit_seconds(end - begin)
    target = url
    for _ in range(REDIRECTS + 1):
        try:
            connection, answer = _get(target, trusted, begin, end)
            with connection:
                if answer.status in (301, 302, 303, 307, 308):
                    target = urljoin(target, answer.getheader("Location", ""))
                    continue
                return _read(answer, url, end - begin, deadline)
        except ssl.SSLCertVerificationError as error:
            raise DataError(
                f"{_origin(target)} does not prove who it is ({error.verify_message}): check the"
                " URL, or the certificates of this machine"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(str(error) or type(error).__name__) from None
    raise DataError(f"{url} redirects more than {REDIRECTS} times: name the file itself")


def _get(
    url: str, trusted: str, begin: int, end: int
) -> tuple["_Connection", http.client.HTTPResponse]:
    parts = urlsplit(url)
    headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    is_trusted = bool(trusted) and parts.netloc == trusted
    if is_trusted and (token := _token()):
        headers["Authorization"] = f"Bearer {token}"
    connection = _Connection(parts, is_trusted=is_trusted)
    try:
        path = parts.path or "/"
        connection.http.request(
            "GET", f"{path}?{parts.query}" if parts.query else path, None, headers
        )
        return connection, connection.http.getresponse()
    except BaseException:
        connection.close()
        raise


class _Connection:
    """A connection to a host whose address was checked, unless it is trusted."""

    def __init__(self, parts: SplitResult, *, is_trusted: bool) -> None:
        if parts.scheme != "https" and not (is_trusted and parts.scheme == "http"):
            raise DataError(f"{_origin(parts.geturl())} is no https:// address: use one that is")
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        address = host if is_trusted else check_address(host, port)
        raw = socket.create_connection((address, port), 10.0)
        raw.settimeout(PATIENCE.request_seconds)
        self.http = http.client.HTTPConnection(host, port)
        self.http.sock = raw
        if parts.scheme == "https":
            self.http = http.client.HTTPSConnection(host, port)
            self.http.sock = _tls().wrap_socket(raw, server_hostname=host)

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self.http.close()


def _read(answer: http.client.HTTPResponse, url: str, expected: int, deadline: float) -> _Answer:
    """The part that a server sends; what else it may say, as the right error."""
    span = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.getheader("Content-Range", ""))
    if answer.status != 206 or span is None:
        _refuse(answer, url)
    version = answer.getheader("ETag") or answer.getheader("Last-Modified") or ""
    content = bytearray()
    while chunk := answer.read(min(_CHUNK_BYTES, expected - len(content))):
        content += chunk
        if time.monotonic() > deadline:
            raise TransientError("no end of the answer in time")
    if len(content) != expected:
        raise TransientError(f"{len(content):,} of {expected:,} bytes came")
    return _Answer(bytes(content), int(span[1]), version)


def _refuse(answer: http.client.HTTPResponse, url: str) -> NoReturn:
    status = answer.status
    if status == 429 or status >= 500:
        wait = answer.getheader("Retry-After", "0")
        time.sleep(min(float(wait), LONGEST_WAIT_SECONDS) if wait.isdigit() else 0)
        raise TransientError(f"status {status}")
    if status in (401, 403):
        raise DataError(
            f"{url} may not be read ({status}): set HF_TOKEN for a data set of the hub whose terms"
            " you have accepted there, or fetch the file yourself"
        )
    if status in (404, 410):
        raise DataError(f"there is no {url} ({status}): check the name")
    if status == 200:
        raise DataError(
            f"{_origin(url)} does not send parts of files: download {url} and name the file"
        )
    if status == 416:
        raise DataError(f"{url} is empty, or shorter than it was: check the file")
    raise DataError(f"{_origin(url)} answers {status} to a request for {url}: fetch it yourself")


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _token() -> str | None:
    """The hub's token, from HF_TOKEN or where `hf auth login` has put it."""
    from huggingface_hub import get_token

    return get_token()


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
