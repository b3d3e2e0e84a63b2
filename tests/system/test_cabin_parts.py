"""The cabin example's folder, record and queue."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.cabin import frames
from examples.cabin import record as record_module
from examples.cabin.frames import Folder, Frame, ReplacedError
from examples.cabin.record import Record
from examples.cabin.waiting import Waiting
from shared.errors import UsageError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path, clock: Clock) -> Folder:
    return Folder(tmp_path, settle=1.0, clock=clock)


def whole(folder: Folder) -> list[str]:
    return [frame.name for frame in folder.look()[0]]


def frame(number: int) -> Frame:
    return Frame(number, f"{number}.jpg", 10)


def test_it_needs_no_more_than_the_device_does() -> None:
    script = "import examples.cabin.cabin, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert not set(loaded) & {"torch", "transformers", "onnx", "export", "cloud_backend", "benchmarks", "tests"}


# --- the folder ---


def test_a_file_is_whole_once_it_stays_as_it_is(tmp_path: Path, folder: Folder, clock: Clock) -> None:
    (tmp_path / "a.jpg").write_bytes(b"half")
    assert whole(folder) == []
    clock.now = 0.9
    (tmp_path / "a.jpg").write_bytes(b"half and half")
    assert whole(folder) == []
    clock.now = 1.8
    assert whole(folder) == []
    clock.now = 2.0
    assert whole(folder) == ["a.jpg"]


def test_frames_come_by_age(tmp_path: Path, folder: Folder, clock: Clock) -> None:
    for name, modified in (("b.jpg", 3), ("c.PNG", 1), ("a.webp", 2)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (modified, modified))
    folder.look()
    clock.now = 1.0
    assert whole(folder) == ["c.PNG", "a.webp", "b.jpg"]


def test_what_is_no_frame_is_left_alone(tmp_path: Path, folder: Folder, clock: Clock) -> None:
    (tmp_path / ".hidden.jpg").write_bytes(b"x")
    (tmp_path / "a.jpg.tmp").write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe.jpg")
    folder.look()
    clock.now = 1.0
    assert folder.look() == ([], set())


def test_a_frame_that_was_written_over_is_another_one(tmp_path: Path, folder: Folder, clock: Clock) -> None:
    (tmp_path / "a.jpg").write_bytes(b"one")
    folder.look()
    clock.now = 1.0
    [[first], _] = folder.look()
    assert folder.read(first) == b"one"
    (tmp_path / "a.jpg").write_bytes(b"three")
    with pytest.raises(ReplacedError):
        folder.read(first)
    assert not folder.unchanged(first)
    folder.remove(first)
    folder.look()
    clock.now = 2.0
    [[second], _] = folder.look()
    assert folder.read(second) == b"three"


def test_a_pipe_or_a_link_in_a_frames_place_is_not_opened(tmp_path: Path, folder: Folder) -> None:
    (tmp_path / "a.jpg").write_bytes(b"one")
    [first] = folder.look()[1]
    for replace in (lambda path: os.mkfifo(path), lambda path: path.symlink_to("/etc/passwd")):
        (tmp_path / "a.jpg").unlink()
        replace(tmp_path / "a.jpg")
        with pytest.raises(ReplacedError):
            folder.read(first)


def test_too_many_frames_are_refused_rather_than_remembered(
    tmp_path: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "MOST_FILES", 3)
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="seen more than 3 frames, wanted fewer"):
        folder.look()


def test_a_frame_that_is_too_large_is_not_read(tmp_path: Path, folder: Folder) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(frames.MOST_BYTES + 1)
    [large] = folder.look()[1]
    with pytest.raises(UsageError, match=f"seen {frames.MOST_BYTES + 1} bytes"):
        folder.read(large)


# --- the record ---


def test_what_was_recorded_is_there_after_a_restart(tmp_path: Path) -> None:
    record = Record(tmp_path / "state")
    record.add(frame(1))
    record.close()
    again = Record(tmp_path / "state")
    assert frame(1) in again
    assert frame(2) not in again
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600


def test_a_line_that_was_cut_by_a_power_failure_is_left_out(tmp_path: Path) -> None:
    record = Record(tmp_path / "state")
    record.add(frame(1))
    record.add(frame(2))
    record.close()
    os.truncate(tmp_path / "state", (tmp_path / "state").stat().st_size - 5)
    again = Record(tmp_path / "state")
    again.keep({frame(1), frame(2)})
    again.add(frame(3))
    again.close()
    last = Record(tmp_path / "state")
    assert [one in last for one in (frame(1), frame(2), frame(3))] == [True, False, True]


def test_frames_that_are_gone_are_forgotten_and_the_file_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "SPARE_LINES", 20)
    record = Record(tmp_path / "state")
    for number in range(50):
        record.keep({frame(number - 1), frame(number)})
        record.add(frame(number))
    assert len(record) == 2
    assert len((tmp_path / "state").read_bytes().splitlines()) <= 20 + 2
    record.close()
    assert frame(49) in Record(tmp_path / "state")


def test_two_programs_do_not_share_a_record(tmp_path: Path) -> None:
    record = Record(tmp_path / "state")
    record.keep(set())  # the file is another one by now
    with pytest.raises(UsageError, match="another process uses it"):
        Record(tmp_path / "state")


# --- the queue ---


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / ".state")


def queue(record: Record, *, oldest_wait: bool) -> tuple[Waiting, list[Frame]]:
    """One of two places, and what it drops."""
    dropped: list[Frame] = []
    return Waiting(record, 2, oldest_wait=oldest_wait, on_drop=dropped.append), dropped


def test_the_newest_win_and_what_is_dropped_is_named_once(record: Record) -> None:
    waiting, dropped = queue(record, oldest_wait=False)
    there = [frame(number) for number in range(5)]
    assert waiting.offer(there, set(there)) == there[:3] == dropped
    assert waiting.offer(there, set(there)) == []
    assert [waiting.take(), waiting.take()] == there[3:]


def test_the_oldest_wait_and_nothing_is_dropped(record: Record) -> None:
    waiting, dropped = queue(record, oldest_wait=True)
    there = [frame(number) for number in range(5)]
    seen = []
    for _ in there:
        waiting.offer(there, set(there))
        seen.append(waiting.take())
        waiting.done()
    assert seen == there
    assert dropped == []


def test_a_frame_that_is_being_described_is_not_taken_in_again(record: Record) -> None:
    waiting, _ = queue(record, oldest_wait=False)
    waiting.offer([frame(1)], {frame(1)})
    waiting.take()
    waiting.offer([frame(1)], {frame(1)})
    assert len(waiting) == 1
    waiting.done()
    waiting.offer([frame(1)], {frame(1)})
    assert len(waiting) == 0


def test_whoever_waits_is_told_of_a_failure(record: Record) -> None:
    waiting, _ = queue(record, oldest_wait=False)
    waiting.fail(BrokenPipeError())
    with pytest.raises(BrokenPipeError):
        waiting.take()
