"""A camera that fills a folder: frames in every way in which one may be written."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (640, 480)
PAUSE = 0.1  # seconds in the middle of a frame that is written slowly


class Camera:
    """Writes a frame every `every` seconds from `start` to `stop`; most are renamed when they are whole.

    Every seventh is written in place, in two halves. Every eleventh is no image.
    """

    def __init__(self, folder: Path, every: float) -> None:
        self.written: dict[str, float] = {}  # name: when it was whole, by the monotonic clock
        self.broken: set[str] = set()
        self._folder = folder
        self._every = every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """The first frame is there at once."""
        self._thread.start()

    def stop(self) -> None:
        """The last frame is there."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while True:
            self._write(number)
            number += 1
            if self._over.wait(self._every):
                return

    def _write(self, number: int) -> None:
        name = f"{number:06d}.jpg"
        path = self._folder / name
        data = picture(number)
        if number % 11 == 10:
            data = data[: len(data) // 3]
            self.broken.add(name)
        if number % 7 == 6:
            with path.open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                time.sleep(PAUSE)
                file.write(data[len(data) // 2 :])
        else:
            hidden = path.with_name(f".{name}")
            hidden.write_bytes(data)
            hidden.rename(path)
        self.written[name] = time.monotonic()


def picture(number: int) -> bytes:
    """A JPEG that is unlike the others: a road of noise under a sky, and a box that moves."""
    chance = np.random.default_rng(number)
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[: SIZE[1] // 2] = (110, 160, 230)
    pixels[SIZE[1] // 2 :] = chance.integers(60, 110, (SIZE[1] // 2, SIZE[0], 1), np.uint8)
    left = 7 * number % (SIZE[0] - 100)
    pixels[200:300, left : left + 100] = chance.integers(0, 256, 3, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()
