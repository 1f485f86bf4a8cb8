"""Getting the data against a real HTTP server on loopback, which misbehaves in every listed way."""

import gzip
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import NAMES

from vae_hyperband.common.errors import DataError
from vae_hyperband.data import download, fashion_mnist
from vae_hyperband.data.splits import load_split


class Server(http.server.ThreadingHTTPServer):
    """``answers[path]`` is (status, body), or a function that answers; ``asked`` what was asked."""

    daemon_threads = True

    def __init__(self):
        self.answers, self.asked, self.num_drops = {}, [], 40
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request, client_address):
        """Who was to be cut off has been."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        answer = self.server.answers.get(self.path, (404, b""))
        if callable(answer):
            return answer(self)
        status, body = answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def files(tmp_path, monkeypatch, small_data):
    """The four files as they are to arrive; none is on this machine."""
    monkeypatch.setenv("VAE_HYPERBAND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", tmp_path / "nothing")
    content = {name: (small_data / name).read_bytes() for name in NAMES}
    digests = {name: hashlib.sha256(body).hexdigest() for name, body in content.items()}
    for module in (fashion_mnist, download):
        monkeypatch.setattr(module, "FASHION_MNIST_SHA256", digests)
    return content


@pytest.fixture
def mirrors(server, files):
    """A bad mirror and a good one."""
    for name, body in files.items():
        server.answers[f"/good/{name}.gz"] = (200, gzip.compress(body))
    return server.url + "bad/", server.url + "good/"


def in_cache(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.name != ".lock")


def says_nothing(handler):
    time.sleep(3)


def drips(handler):
    """A byte at a time, so that no read ever waits for long."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(handler.server.num_drops):
        handler.wfile.write(b"\x1f")
        handler.wfile.flush()
        time.sleep(0.05)


def drips_headers(handler):
    """The same before the answer has begun."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    for _ in range(handler.server.num_drops):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)


def cut_off(body):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2])

    return answer


def of_another_length(body):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body) - 100))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def without_end(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(1 << 16))


def to_itself(handler):
    handler.send_response(302)
    handler.send_header("Location", handler.path)
    handler.end_headers()


def to_a_file(handler):
    handler.send_response(302)
    handler.send_header("Location", "file:///etc/hostname")
    handler.end_headers()


FAULTS = {
    "forbidden": lambda files: (403, b"no"),
    "broken": lambda files: (500, b""),
    "a captive portal": lambda files: (200, b"<html>please log in</html>"),
    "another file": lambda files: (200, gzip.compress(files[NAMES[1]])),
    "a flipped bit": lambda files: (
        200, gzip.compress(files[NAMES[0]][:99] + b"\x01" + files[NAMES[0]][100:])
    ),
    "half a gzip": lambda files: (200, gzip.compress(files[NAMES[0]])[:-500]),
    "cut off": lambda files: cut_off(gzip.compress(files[NAMES[0]])),
    "another length": lambda files: of_another_length(gzip.compress(files[NAMES[0]])),
    "silence": lambda files: says_nothing,
    "drops": lambda files: drips,
    "drops of headers": lambda files: drips_headers,
    "no end": lambda files: without_end,
    "a circle": lambda files: to_itself,
    "a local file": lambda files: to_a_file,
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_mirror_does_wrong_is_passed_over_in_bounded_time(
    server, files, mirrors, tmp_path, monkeypatch, fault
):
    monkeypatch.setattr(download, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(download, "MAX_BYTES", 2_000_000)
    server.answers[f"/bad/{NAMES[0]}.gz"] = FAULTS[fault](files)
    for name in NAMES[1:]:
        server.answers[f"/bad/{name}.gz"] = server.answers[f"/good/{name}.gz"]
    download.ensure_data(mirrors=mirrors)
    assert len(load_split("train")) == 300
    assert in_cache(tmp_path) == sorted(name + ".gz" for name in NAMES)
    assert f"/good/{NAMES[0]}.gz" in server.asked


@pytest.mark.parametrize("fault", [*FAULTS, "nobody there"])
def test_where_no_mirror_has_it_one_sentence_says_what_to_do(
    server, files, tmp_path, monkeypatch, capsys, fault
):
    monkeypatch.setattr(download, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(download, "TOTAL_SECONDS", 2.0)
    monkeypatch.setattr(download, "MAX_BYTES", 2_000_000)
    server.num_drops = 400  # which take 20 s
    url = "http://127.0.0.1:1/"
    if fault != "nobody there":
        server.answers[f"/bad/{NAMES[0]}.gz"] = FAULTS[fault](files)
        url = server.url + "bad/"
    started = time.monotonic()
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        download.ensure_data(mirrors=(url,))
    assert time.monotonic() - started < 15
    assert in_cache(tmp_path) == []
    assert len(server.asked) <= 2 + 20 * (fault == "a circle")
    said = capsys.readouterr().out
    assert f"Could not download {NAMES[0]}.gz" in said
    # a reason that was the same at each try is said once
    assert said.count("refused") <= 1


def test_a_mirror_that_fails_once_is_asked_again(server, files, mirrors, tmp_path):
    good = server.answers[f"/good/{NAMES[0]}.gz"]

    def once(handler):
        server.answers[f"/good/{NAMES[0]}.gz"] = good
        handler.send_response(503)
        handler.end_headers()

    server.answers[f"/good/{NAMES[0]}.gz"] = once
    download.ensure_data(mirrors=mirrors[1:])
    assert len(load_split("train")) == 300


def test_a_cache_that_cannot_be_written_is_one_sentence(files, monkeypatch):
    monkeypatch.setenv("VAE_HYPERBAND_CACHE", "/proc/self/nothing")
    with pytest.raises(DataError, match="could not be downloaded"):
        download.ensure_data(mirrors=("http://127.0.0.1:1/",))


def test_data_that_is_there_needs_no_network_and_no_cache(files, tmp_path, monkeypatch, small_data):
    """As on a machine whose home is read-only: nothing is written where nothing is missing."""
    for name in NAMES:
        (tmp_path / "nothing").mkdir(exist_ok=True)
        (tmp_path / "nothing" / name).write_bytes(files[name])
    monkeypatch.setattr(download, "_alone", None)  # would raise TypeError if called
    download.ensure_data(mirrors=())


def test_a_file_that_is_there_is_not_fetched_again(server, files, mirrors, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / (NAMES[0] + ".gz")).write_bytes(gzip.compress(files[NAMES[0]]))
    download.ensure_data(mirrors=mirrors[1:])
    assert len(server.asked) == 3


#: ensure_data in a process of its own: the files' digests, then the mirrors
SCRIPT = """
import json, sys
from pathlib import Path
from vae_hyperband.data import download, fashion_mnist
fashion_mnist.SYSTEM_FOLDER = Path("/nothing")
fashion_mnist.FASHION_MNIST_SHA256 = download.FASHION_MNIST_SHA256 = json.loads(sys.argv[1])
download.ensure_data(mirrors=sys.argv[2:])
"""


def process(*mirrors):
    import json

    arguments = [
        sys.executable,
        "-c",
        SCRIPT,
        json.dumps(fashion_mnist.FASHION_MNIST_SHA256),
        *mirrors,
    ]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.faults
def test_of_eight_processes_that_start_together_one_downloads(server, files, mirrors, tmp_path):
    for path, (status, body) in server.answers.items():

        def slowly(handler, status=status, body=body):
            time.sleep(1)  # so that all are there before the first has done
            handler.send_response(status)
            handler.end_headers()
            handler.wfile.write(body)

        server.answers[path] = slowly
    together = [process(mirrors[1]) for _ in range(8)]
    said = [child.communicate(timeout=120)[0] for child in together]
    assert [child.returncode for child in together] == [0] * 8, said
    assert sorted(server.asked) == sorted(f"/good/{name}.gz" for name in NAMES)
    assert sum("downloaded" in text for text in said) == 1
    assert in_cache(tmp_path) == sorted(name + ".gz" for name in NAMES)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.faults),
        pytest.param(signal.SIGINT, marks=pytest.mark.faults),
    ],
)
def test_a_download_that_was_killed_leaves_nothing_in_the_way(
    server, files, mirrors, tmp_path, number
):
    good = server.answers[f"/good/{NAMES[2]}.gz"]
    reached, killed = threading.Event(), threading.Event()

    def half(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(good[1])))
        handler.end_headers()
        handler.wfile.write(good[1][:100])
        handler.wfile.flush()
        reached.set()
        killed.wait(120)

    server.answers[f"/good/{NAMES[2]}.gz"] = half
    child = process(mirrors[1])
    while not reached.wait(0.1):
        assert child.poll() is None, child.communicate()
    time.sleep(0.2)  # for the half of it to arrive
    os.kill(child.pid, number)
    child.communicate(timeout=120)
    killed.set()
    assert child.returncode in (-number, 1)  # 1: Python's KeyboardInterrupt; the command says 130
    server.answers[f"/good/{NAMES[2]}.gz"] = good
    again = process(mirrors[1])
    assert "downloaded" in again.communicate(timeout=120)[0]
    assert again.returncode == 0
    assert in_cache(tmp_path) == sorted(name + ".gz" for name in NAMES)
    assert server.asked.count(f"/good/{NAMES[0]}.gz") == 1  # what had arrived is not lost
