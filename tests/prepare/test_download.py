"""Fetching from a server on this machine: whole, resumed, cut short, wrong, and not there."""

import contextlib
import fcntl
import hashlib
import http.server
import io
import os
import shutil
import threading
import time
import zipfile

import pytest

from s2d3d.errors import InputError, UnreadableError
from s2d3d.prepare.download import ARCHIVES, Archive, download, fetch, unpack

BODY = bytes(range(256)) * 400
MD5 = hashlib.md5(BODY, usedforsecurity=False).hexdigest()


@pytest.fixture
def server():
    """Serves `files` by name; understands ranges unless `ranges` is off, and hangs up after `limit` bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.server.files.get(self.path.strip("/"))
            self.server.requests.append(self.headers.get("Range"))
            if body is None:
                self.send_error(404)
                return
            asked = self.headers.get("Range")
            start = int(asked[len("bytes=") : -1]) if asked and self.server.ranges else 0
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start : self.server.limit])

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.files, httpd.requests, httpd.ranges, httpd.limit = {"set.zip": BODY}, [], True, None
    httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_a_transfer_that_was_cut_short_goes_on_where_it_ended(server, tmp_path):
    path = tmp_path / "deep" / "set.zip"
    server.limit = 70_000
    with pytest.raises(InputError, match=r"the connection ended after 70,000 of 102,400 bytes; start again to go on"):
        download(f"{server.url}/set.zip", path, md5=MD5)
    assert not path.exists()
    server.limit = None
    assert download(f"{server.url}/set.zip", path, md5=MD5).read_bytes() == BODY
    assert server.requests == [None, "bytes=70000-"]
    download(f"{server.url}/set.zip", path, md5=MD5.upper())
    assert len(server.requests) == 2, "what is there is not fetched again"
    assert [file.name for file in path.parent.iterdir()] == ["set.zip"]


def test_a_server_without_ranges_and_one_that_had_sent_everything(server, tmp_path):
    (tmp_path / "a.zip.part").write_bytes(BODY[:500])
    server.ranges = False
    assert download(f"{server.url}/set.zip", tmp_path / "a.zip", md5=MD5).read_bytes() == BODY
    server.ranges = True
    (tmp_path / "b.zip.part").write_bytes(BODY)
    assert download(f"{server.url}/set.zip", tmp_path / "b.zip", md5=MD5).read_bytes() == BODY


def test_another_content_is_refused_and_not_resumed(server, tmp_path):
    with pytest.raises(UnreadableError, match=f"its MD5 is {MD5}, must be 00; it was removed"):
        download(f"{server.url}/set.zip", tmp_path / "set.zip", md5="00")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "set.zip").write_bytes(b"other")
    with pytest.raises(UnreadableError, match="remove it, fetch it again"):
        download(f"{server.url}/set.zip", tmp_path / "set.zip", md5=MD5)


def test_no_way_to_it_is_said_plainly(server, tmp_path):
    with pytest.raises(
        InputError, match=r"cannot fetch http://127.0.0.1:\d+/no.zip \(404 Not Found\); if this machine has"
    ):
        download(f"{server.url}/no.zip", tmp_path / "no.zip")
    with pytest.raises(InputError, match=r"cannot fetch http://127.0.0.1:1/set.zip \(.*refused.*\); if .* --from"):
        download("http://127.0.0.1:1/set.zip", tmp_path / "set.zip")
    assert list(tmp_path.iterdir()) == []


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_archives_are_unpacked_once_and_inside_their_folder(server, tmp_path):
    body = zipped({"Set/a.txt": "a", "Set/b/c.txt": "c", "__MACOSX/x": "", "../../evil.txt": "!"})
    server.files["set.zip"] = body
    archives = {"set": Archive(f"{server.url}/set.zip")}
    root = tmp_path / "downloads"
    folder = fetch("set", root, archives=archives)
    assert (folder / "Set" / "b" / "c.txt").read_text() == "c"
    assert not list(tmp_path.glob("evil.txt")) and not list(root.glob("evil.txt"))
    (folder / "Set" / "a.txt").write_text("mine")
    fetch("set", root, archives=archives)
    assert (folder / "Set" / "a.txt").read_text() == "mine" and len(server.requests) == 1
    (root / "plain.zip").write_bytes(zipped({"Set/a.txt": "a"}))
    assert unpack(root / "plain.zip", root / "plain") == root / "plain" / "Set"
    (root / "bad.zip").write_bytes(body[:60])
    with pytest.raises(UnreadableError, match=r"bad\.zip: not a zip archive, or damaged"):
        unpack(root / "bad.zip", root / "bad")


def test_the_tool_fetches_and_copies(server, tmp_path, shapes_root, tool, monkeypatch, capsys):
    names = ("shape_names.txt", "train_files.txt", "test_files.txt", "ply_data_train0.h5", "ply_data_test0.h5")
    server.files["set.zip"] = zipped(
        {f"modelnet40_ply_hdf5_2048/{name}": (shapes_root / name).read_bytes() for name in names}
    )
    prepare = tool("prepare_data")
    monkeypatch.setitem(ARCHIVES, "modelnet40_ply_hdf5_2048", Archive(f"{server.url}/set.zip"))
    code = prepare.main(["modelnet40", "--download", "--output", str(tmp_path / "set")])
    assert (code, capsys.readouterr().out) == (0, f"{tmp_path}/set: 96 training and 36 test shapes\n")
    assert (tmp_path / "downloads" / "modelnet40_ply_hdf5_2048.zip").is_file()


@pytest.fixture
def raw_server():
    """Answers each connection by `answer(socket)`."""
    import socketserver

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(4096)
            with contextlib.suppress(OSError):
                self.server.answer(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close, allow_reuse_address = True, False, True

    server = Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def drip(request, text=b"x", count=200):
    for _ in range(count):
        request.sendall(text)
        time.sleep(0.02)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda request: drip(request, HEAD[:1]), r"cannot fetch .*; if this machine"),
        (lambda request: (request.sendall(HEAD), drip(request, b"X: y\r\n")), r"cannot fetch .*; if this machine"),
        (lambda request: (request.sendall(HEAD + b"\r\n"), drip(request)), r"the server sends \d+ bytes a second"),
    ],
    ids=["status", "headers", "body"],
)
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(raw_server, tmp_path, answer, message):
    raw_server.answer = answer
    started = time.monotonic()
    with pytest.raises(InputError, match=message):
        download(f"{raw_server.url}/a.zip", tmp_path / "a.zip", timeout=0.3)
    assert time.monotonic() - started < 3 and not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/a.zip", "file:///etc/passwd", "gopher://x/a"])
def test_only_web_addresses_are_followed(raw_server, tmp_path, target):
    answer = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()
    raw_server.answer = lambda request: request.sendall(answer)
    with pytest.raises(InputError, match=r"which is not followed|is not allowed"):
        download(f"{raw_server.url}/a.zip", tmp_path / "a.zip")
    with pytest.raises(InputError, match="cannot fetch"):
        download(target, tmp_path / "a.zip")
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_the_place_of_the_part_is_not_followed(server, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"mine")
    (tmp_path / "link.zip.part").symlink_to(other)
    os.mkfifo(tmp_path / "pipe.zip.part")
    (tmp_path / "folder.zip.part").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(InputError, match="is no regular file; remove it"):
            download(f"{server.url}/set.zip", tmp_path / f"{name}.zip")
    os.mkfifo(tmp_path / "there.zip")
    with pytest.raises(InputError, match="is no regular file"):
        download(f"{server.url}/set.zip", tmp_path / "there.zip")
    assert other.read_bytes() == b"mine" and not server.requests


def test_two_processes_do_not_fetch_one_file(server, tmp_path):
    part = tmp_path / "set.zip.part"
    with open(part, "wb") as file:
        file.write(b"abc")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process fetches this file"):
            download(f"{server.url}/set.zip", tmp_path / "set.zip")
    assert part.read_bytes() == b"abc"


def spoiled(place, value, size=2):
    """Return an archive with a field of its headers replaced: at `place` of the local one, 2 later in the list."""
    body = bytearray(zipped({"Set/a.txt": "a" * 1000}))
    for head, shift in ((body.find(b"PK\x03\x04"), 0), (body.find(b"PK\x01\x02"), 2)):
        body[head + place + shift : head + place + shift + size] = value.to_bytes(size, "little")
    return bytes(body)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (spoiled(6, 1), UnreadableError, "is encrypted; remove it and fetch it again"),
        (spoiled(8, 97), UnreadableError, "not a zip archive, or damaged"),
        (spoiled(8, 99), UnreadableError, "not a zip archive, or damaged"),
        (spoiled(8, 8), UnreadableError, "not a zip archive, or damaged"),
        (spoiled(8, 14), UnreadableError, "not a zip archive, or damaged"),
        (spoiled(14, 7, 4), UnreadableError, "not a zip archive, or damaged"),
        (spoiled(22, 2**31, 4), InputError, "unpacks to 2,147,483,648 bytes in 1 files, more than any"),
    ],
    ids=["encrypted", "unknown", "AES", "deflate", "lzma", "checksum", "bomb"],
)
def test_archives_that_cannot_be_unpacked(tmp_path, body, error, message):
    (tmp_path / "a.zip").write_bytes(body)
    with pytest.raises(error, match=message):
        unpack(tmp_path / "a.zip", tmp_path / "a")
    assert not (tmp_path / "a" / ".unpacked").exists()


def test_an_archive_needs_room(tmp_path, monkeypatch):
    (tmp_path / "a.zip").write_bytes(zipped({"Set/a.txt": "a" * 1000}))
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(2000, 1900, 100))
    with pytest.raises(InputError, match="unpacks to 1,000 bytes, 100 are free; make room"):
        unpack(tmp_path / "a.zip", tmp_path / "a")


def test_a_sha256_is_checked(server, tmp_path):
    digest = hashlib.sha256(BODY).hexdigest()
    assert download(f"{server.url}/set.zip", tmp_path / "a.zip", sha256=digest).read_bytes() == BODY
    with pytest.raises(UnreadableError, match=f"its SHA256 is {digest}, must be 00; it was removed"):
        download(f"{server.url}/set.zip", tmp_path / "b.zip", sha256="00")
