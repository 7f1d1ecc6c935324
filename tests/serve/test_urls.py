"""URLs of strangers: only what is public is fetched, whatever names and redirects say."""

import http.server
import socket
import threading

import pytest

from wan.serve import urls
from wan.serve.refused import Refused

PRIVATE = [
    *("127.0.0.1", "127.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
    *("224.0.0.1", "255.255.255.255", "240.0.0.1", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1"),
    *(
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
    ),
    *("2002:7f00:1::", "2001:db8::1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address):
    assert not urls.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert urls.is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://127.0.0.1/",
            "http://localhost/",
            "http://[::1]/",
            "http://0/",
            "http://2130706433/",
            "http://127.1/",
        ),
        *("http://0x7f.0.0.1/", "http://[::ffff:127.0.0.1]/", "http://169.254.169.254/latest/meta-data/"),
        *(
            "file:///etc/passwd",
            "ftp://example.com/a",
            "http:///a",
            "http://a:b@example.com/",
            "gopher://x",
            "http://x:0/",
        ),
        *("http://exa mple.com/", "http://x\r\nHost: y/", "http://ex\u00e4mple.com/", "http://x:99999/", "//x", ""),
    ],
)
def test_what_is_refused(url, tmp_path):
    with pytest.raises(Refused) as caught:
        urls.fetch(url, tmp_path / "a", 100)
    assert caught.value.status == 400 and not (tmp_path / "a").exists()


class Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        status, headers, body = self.server.pages[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def site(monkeypatch):
    """A server of this machine that is looked up as `public.test`, at an address that counts as public."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.pages, server.asked = {}, []
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    look_up, connect = socket.getaddrinfo, socket.create_connection
    server.looked_up = []

    def found(host, port, *rest, **more):
        server.looked_up.append(host)
        address = {"public.test": "8.8.8.8", "inner.test": "192.168.0.1"}.get(host)
        return look_up(address or host, port, *rest, **more)

    def connected(address, *rest, **more):
        server.connected = address
        return connect(("127.0.0.1", server.server_port) if address[0] == "8.8.8.8" else address, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", found)
    monkeypatch.setattr(socket, "create_connection", connected)
    yield server
    server.shutdown()
    server.server_close()


def test_the_address_that_was_checked_is_the_one_connected_to(site, tmp_path):
    site.pages["/a?b=1"] = (200, {}, b"hello")
    urls.fetch("http://public.test/a?b=1", tmp_path / "a", 5)
    assert (tmp_path / "a").read_bytes() == b"hello"
    assert site.connected == ("8.8.8.8", 80)  # and not a name, which may stand for another one by now
    assert site.looked_up.count("public.test") == 1 and site.asked == [("/a?b=1", "public.test")]


@pytest.mark.parametrize(
    "where", ["http://inner.test/", "http://127.0.0.1/", "http://169.254.169.254/", "file:///etc/passwd"]
)
def test_redirects_are_checked_too(site, tmp_path, where):
    site.pages["/"] = (302, {"Location": where}, b"")
    with pytest.raises(Refused, match="public internet|must be http"):
        urls.fetch("http://public.test/", tmp_path / "a", 100)


def test_redirects_end(site, tmp_path):
    site.pages |= {"/": (302, {"Location": "/again"}, b""), "/again": (307, {"Location": "http://public.test/"}, b"")}
    with pytest.raises(Refused, match="redirects more than"):
        urls.fetch("http://public.test/", tmp_path / "a", 100)
    site.pages["/again"] = (200, {}, b"there")
    urls.fetch("http://public.test/", tmp_path / "a", 100)
    assert (tmp_path / "a").read_bytes() == b"there"


def test_too_much_too_little_and_errors(site, tmp_path, monkeypatch):
    site.pages |= {"/": (200, {}, b"x" * 101), "/404": (404, {}, b""), "/cut": (200, {"Content-Length": "9"}, b"x")}
    for path, told in (("/", "larger than 100"), ("/404", "status 404"), ("/cut", "ends too early")):
        with pytest.raises(Refused, match=told):
            urls.fetch(f"http://public.test{path}", tmp_path / "a", 100)
