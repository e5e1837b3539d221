import datetime
import http.server
import io
import re
import socket
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from casallm.data import ranges, web
from casallm.data.documents import Oddities, read_documents
from casallm.data.listing import SourceFile, list_files
from casallm.data.ranges import open_ranges
from casallm.data.sources import open_source, plan_units
from casallm.data.web import check_address, is_public, open_web
from casallm.errors import DataError, StoreError
from casallm.storage.retry import Patience

CONTENT = b"".join(b'{"text": "document %d"}\n' % number for number in range(500))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for localhost and its key, as one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(private + signed.public_bytes(pem))
    return path


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answer = self.server.answer
        if callable(answer):
            answer(self)
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        part = answer[int(span[1]) : int(span[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {span[1]}-{span[2]}/{len(answer)}")
        self.send_header("ETag", '"v1"')
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(certificate, monkeypatch):
    """An https server of one file, known by the certificate that it has."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(web, "PATIENCE", Patience(3, 0.01, request_seconds=2.0))
    web._tls.cache_clear()
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    running.socket = context.wrap_socket(running.socket, server_side=True)
    running.answer = CONTENT
    running.handle_error = lambda *_: None
    running.host = f"localhost:{running.server_address[1]}"
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()
    web._tls.cache_clear()


def refuse(status, **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def test_a_file_on_the_web_is_read_in_parts(server, monkeypatch):
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 1000)

    file, version = open_web(f"https://{server.host}/a/docs.jsonl", trusted=server.host)

    assert (file.n_bytes, file.name, version) == (len(CONTENT), "docs.jsonl", '"v1"')
    with file.open("rb") as opened:
        assert opened.read() == CONTENT
        opened.seek(-100, io.SEEK_END)
        assert opened.read() == CONTENT[-100:]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (refuse(200), "does not send parts of files: download https://localhost"),
        (refuse(404), r"there is no https://localhost:\d+/a.jsonl \(404\)"),
        (refuse(403), r"may not be read \(403\)"),
        (refuse(418), "answers 418"),
        (refuse(416), "is empty, or shorter"),
        (refuse(302, Location="http://example.org/a.jsonl"), "http://example.org is no https://"),
        (refuse(302, Location="file:///etc/passwd"), "is no https:// address"),
        (refuse(302, Location="/a.jsonl"), "redirects more than 5 times"),
        (refuse(302, Location="https://127.0.0.1/"), "has the address 127.0.0.1, which is not"),
        (refuse(302, Location="https://[::1]/"), "has the address ::1, which is not public"),
    ],
)
def test_what_a_server_says_instead_is_one_sentence(server, answer, says):
    server.answer = answer

    with pytest.raises(DataError, match=says):
        open_web(f"https://{server.host}/a.jsonl", trusted=server.host)


def test_a_busy_server_is_asked_again_and_then_said(server):
    server.answer = refuse(503, Retry_After="0")

    with pytest.raises(StoreError, match=r"failed 3 times \(last: status 503\)"):
        open_web(f"https://{server.host}/a.jsonl", trusted=server.host)


def test_a_file_that_changes_while_it_is_read_is_refused(server):
    file, _ = open_web(f"https://{server.host}/a.jsonl", trusted=server.host)
    server.answer = CONTENT + b"more"

    with pytest.raises(DataError, match="it changed while it was read"), file.open("rb") as opened:
        opened.read()


def test_a_server_that_nobody_vouches_for_is_not_read(server, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    web._tls.cache_clear()

    with pytest.raises(DataError, match="does not prove who it is"):
        open_web(f"https://{server.host}/a.jsonl", trusted=server.host)


def test_a_host_inside_the_network_is_not_read(server):
    with pytest.raises(DataError) as caught:
        open_source(f"https://{server.host}/a.jsonl")

    assert "localhost has the address" in str(caught.value)
    assert "may not lead into the network of this machine" in str(caught.value)


@pytest.mark.parametrize("inside", ["10.0.0.1", "169.254.169.254", "fd00:ec2::254"])
def test_one_inner_address_among_public_ones_is_enough_to_refuse(monkeypatch, inside):
    found = [(2, 1, 6, "", ("93.184.216.34", 443)), (2, 1, 6, "", (inside, 443))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    with pytest.raises(DataError, match=f"sneaky.example has the address {inside}"):
        check_address("sneaky.example", 443)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("::ffff:93.184.216.34", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:a9fe:a9fe::1", False),
    ],
)
def test_an_address_is_public_or_not(address, expected):
    assert is_public(address) is expected


@pytest.mark.parametrize(
    "url", ["https://example.org/a.jsonl?signature=secret", "https://me:secret@example.org/a.jsonl"]
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(url):
    with pytest.raises(DataError) as caught:
        open_source(url)

    assert "secret" not in str(caught.value)
    assert "https://example.org/a.jsonl is named with a query or a password" in str(caught.value)


def test_plain_http_and_other_files_are_refused():
    with pytest.raises(DataError, match=r"http://example.org is no https:// address"):
        open_source("http://example.org/a.jsonl")
    with pytest.raises(DataError, match=r"page.html is no file of documents"):
        list_files("https://example.org/page.html")


def test_lines_of_a_remote_file_are_cut_as_those_of_a_local_one(server, monkeypatch):
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 700)
    monkeypatch.setattr("casallm.data.sources.UNIT_BYTES", 3000)
    file, _ = open_web(f"https://{server.host}/docs.jsonl", trusted=server.host)

    units = plan_units([SourceFile(file, "docs.jsonl", "jsonl", file.n_bytes, None)], "text")

    texts = [
        text
        for unit in units
        for piece in unit.pieces
        for text in read_documents(piece, text_column="text", oddities=Oddities())
    ]
    assert len(units) > 3
    assert texts == [f"document {number}" for number in range(500)]


@settings(max_examples=12)
@given(st.binary(max_size=400), st.lists(st.tuples(st.integers(-9, 420), st.integers(0, 99))))
def test_a_remote_file_reads_as_a_local_one(content, moves):
    asked = []

    def fetch(begin, end):
        asked.append((begin, end))
        return content[begin:end]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "BLOCK_BYTES", 32)
        with open_ranges(fetch, len(content)) as remote:
            local = io.BytesIO(content)
            for offset, count in moves:
                start = max(0, offset)
                assert remote.seek(start) == local.seek(start)
                assert remote.read(count) == local.read(count)
            remote.seek(0)
            assert remote.readlines() == io.BytesIO(content).readlines()
    assert all(end - begin <= 32 for begin, end in asked)
