"""Fetching from a server on this machine: whole, resumed, cut short, wrong, and not there."""

import hashlib
import http.server
import io
import threading
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
