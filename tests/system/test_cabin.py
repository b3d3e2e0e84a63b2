"""The cabin example as its own process, with a real cloud: ends, starts again, waits for the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.server import serve

from benchmarks.camera import picture
from benchmarks.tunnel import Tunnel
from tests.conftest import run_cloud
from tests.processes import eventually


class Program:
    """A running example, and what it says."""

    def __init__(self, bundle: Path, url: str, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "examples.cabin", bundle, "--url", url, folder, "--settle", "0", *options]
        self.process = subprocess.Popen(
            [*command, "--max-tokens", "8", "--every", "0.05"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def end(self) -> None:
        """SIGTERM."""
        self.process.terminate()
        assert self.process.wait(20) == 0
        self._reader.join()

    def described(self) -> list[str]:
        return [line["frame"] for line in self.lines if "text" in line]

    def says(self, number: int) -> bool:
        """Whether so many frames are described in time."""
        return eventually(lambda: len(self.described()) >= number, 30)

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(map(json.loads, self.process.stdout))


Start = Callable[..., Program]


@pytest.fixture(scope="module")
def export(tiny_exports: Callable[[str], Path]) -> Path:
    return tiny_exports("llava")


@pytest.fixture(scope="module")
def url(export: Path) -> Iterator[str]:
    with run_cloud(export) as cloud:
        yield cloud.url


@pytest.fixture
def start(export: Path, url: str, tmp_path: Path) -> Iterator[Start]:
    """Starts the example on the test's folder."""
    running: list[Program] = []

    def started(*options: str, url: str = url) -> Program:
        running.append(Program(export / "device", url, tmp_path, *options))
        return running[-1]

    yield started
    for program in running:
        program.process.kill()
        program.process.wait()


def write(folder: Path, numbers: Sequence[int]) -> list[str]:
    names = [f"{number:03d}.jpg" for number in numbers]
    for name, number in zip(names, numbers, strict=True):
        (folder / f".{name}").write_bytes(picture(number))
        (folder / f".{name}").rename(folder / name)
    return names


def test_a_restart_describes_no_frame_twice(start: Start, tmp_path: Path) -> None:
    names = write(tmp_path, range(8))
    first = start("--full", "oldest-wait", "--queue", "1")
    assert first.says(2)
    first.end()
    second = start("--full", "oldest-wait", "--queue", "1")
    assert second.says(2)
    second.process.kill()  # between a line and its record there is a moment, which no test is likely to hit
    second.process.wait()
    third = start("--full", "oldest-wait", "--queue", "1")
    names += write(tmp_path, range(8, 10))
    assert third.says(10 - len(first.described()) - len(second.described()))
    third.end()
    assert first.described() + second.described() + third.described() == names


def test_a_line_says_what_a_description_took(start: Start, tmp_path: Path) -> None:
    write(tmp_path, [1])
    program = start()
    assert program.says(1)
    program.end()
    [line, _] = program.lines
    assert set(line) == {"frame", "time", "text", "seconds", "tokens", "bytes_up", "bytes_down"}
    assert "\n" not in line["text"]
    assert min(line["seconds"], line["bytes_up"], line["bytes_down"]) > 0
    assert program.lines[-1] == {"state": "ended", "described": 1, "dropped": 0, "failed": 0, "waiting": 0}


def test_a_damaged_frame_is_an_error_line_and_the_others_go_on(start: Start, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(picture(1)[:2000])
    (tmp_path / "empty.png").touch()
    program = start()
    assert eventually(lambda: len(program.lines) == 2, 30)
    write(tmp_path, [1])
    assert program.says(1)
    program.end()
    errors = {line["frame"]: line["error"] for line in program.lines if "error" in line}
    assert set(errors) == {"broken.jpg", "empty.png"}
    assert "seen an empty file" in errors["empty.png"]


def test_frames_are_deleted_once_they_are_told_of_where_that_is_wanted(start: Start, tmp_path: Path) -> None:
    write(tmp_path, range(6))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    program = start("--remove", "--queue", "2")
    assert eventually(lambda: not list(tmp_path.glob("*.jpg")), 30)
    program.end()
    assert len({line["frame"] for line in program.lines if "frame" in line}) == 7


@pytest.fixture
def tunnel(url: str) -> Iterator[Tunnel]:
    with Tunnel(int(url.rpartition(":")[2])) as tunnel:
        yield tunnel


def test_a_start_inside_a_tunnel_waits_for_its_end(start: Start, tunnel: Tunnel, tmp_path: Path) -> None:
    names = write(tmp_path, [1, 2])
    tunnel.enter()
    program = start(url=tunnel.url)
    assert eventually(lambda: bool(program.lines), 30)
    tunnel.leave()
    assert program.says(2)
    program.end()
    assert [line.get("state") for line in program.lines] == ["offline", "online", None, None, "ended"]
    assert program.described() == names


def test_it_ends_inside_a_tunnel_and_describes_what_waited_when_it_starts_again(
    start: Start, tunnel: Tunnel, tmp_path: Path
) -> None:
    write(tmp_path, [1])
    program = start(url=tunnel.url)
    assert program.says(1)
    tunnel.enter()
    names = write(tmp_path, [2, 3])
    assert eventually(lambda: program.lines[-1].get("state") == "offline", 30)
    program.end()
    assert program.lines[-1]["waiting"] > 0
    again = start()
    assert again.says(2)
    again.end()
    assert again.described() == names


@contextmanager
def log_in_page(asked: threading.Event) -> Iterator[int]:
    """What a car park's network answers in the place of every server; gives its port."""

    class Page(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Page) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        yield page.server_port
        page.shutdown()


@contextmanager
def any_websocket(asked: threading.Event) -> Iterator[int]:
    """A portal that takes every WebSocket, whatever it is to carry; gives its port."""
    with serve(lambda peer: asked.set(), "127.0.0.1", 0) as portal:
        threading.Thread(target=portal.serve_forever, daemon=True).start()
        yield portal.socket.getsockname()[1]
        portal.shutdown()


@pytest.mark.parametrize("portal", [log_in_page, any_websocket])
def test_a_portal_in_the_clouds_place_is_a_tunnel(
    portal: Callable[[threading.Event], AbstractContextManager[int]], start: Start, tunnel: Tunnel, tmp_path: Path
) -> None:
    write(tmp_path, [1])
    program = start(url=tunnel.url)
    assert program.says(1)
    cloud, asked = tunnel.port, threading.Event()
    with portal(asked) as port:
        tunnel.enter()
        tunnel.port = port
        tunnel.leave()
        write(tmp_path, [2])
        assert asked.wait(30)
        tunnel.port = cloud
        assert program.says(2)
    program.end()
    assert [line.get("state") for line in program.lines] == [None, "offline", "online", None, "ended"]


def test_a_cloud_that_refuses_ends_it(start: Start, export: Path, tiny: Path, tmp_path: Path) -> None:
    write(tmp_path, [1])
    with run_cloud(tiny) as other:
        program = start(url=other.url)
        assert program.process.wait(30) == 1
    assert program.lines == []


def test_it_ends_when_nobody_reads_its_lines_any_more(export: Path, url: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "examples.cabin", export / "device", "--url", url, tmp_path, "--settle", "0"]
    process = subprocess.Popen(command, stdout=writing, stderr=subprocess.DEVNULL)
    os.close(writing)
    os.close(reading)
    write(tmp_path, range(8))  # some of them are dropped, and say so
    assert process.wait(30) == 1
