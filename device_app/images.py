"""Image files to pixels: upright, on white, in the model's size, exactly as the stock image processors on Pillow do it.

A file comes from anywhere. It is a right image or one UsageError that names it: never a crash, never half an image.
"""

from __future__ import annotations

import io
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from device_app.text import printable
from shared.errors import UsageError
from shared.manifest import ImageFormat
from shared.wire import Array

Source = str | Path | bytes | Image.Image

MOST_BYTES = 128 * 2**20  # of a file
MOST_PIXELS = 64 * 2**20  # of an image, as it is stored and when its shorter side was resized
# Not those that start other programs (EPS), take any bytes for an image (TGA), or hold others within (ICO).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
TILE = 1024  # pixels of a side, where an image is worked on in parts
GREYS = ((np.arange(2**16) + 128) // 257).astype(np.uint8)  # 16 bits of grey in 8, rounded
ORIENTATION = 0x0112  # EXIF's tag (CIPA DC-008 §4.6.4), and what brings each of its values upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def pixels(source: Source, wanted: ImageFormat) -> Array:
    """An image as the model takes it: uint8 [height, width, 3], RGB. Of an animation the first frame.

    source: a path, a file's bytes, or an image of Pillow's. Raises UsageError for what is no whole image of
    reasonable size.
    """
    return _fitted(open_image(source), wanted, name_of(source))


def name_of(source: Source) -> str:
    """What errors call an image: its path, if it has one."""
    return f"image {printable(str(source))}" if isinstance(source, (str, Path)) else "image"


def open_image(source: Source) -> Image.Image:
    """A decoded image, upright and in RGB. Raises UsageError, like `pixels`."""
    name = name_of(source)
    if isinstance(source, Image.Image):
        return _decoded(source, name)
    data = source if isinstance(source, bytes) else _read(Path(source), name)
    if not data:
        raise UsageError(f"{name}: seen an empty file, wanted an image")
    if len(data) > MOST_BYTES:
        raise UsageError(f"{name}: seen {len(data)} bytes, wanted at most {MOST_BYTES}")
    Image.init()
    known = [form for form in FORMATS if form in Image.OPEN]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes, which are limited below, and of metadata
        try:
            image = Image.open(io.BytesIO(data), formats=known)
        except UnidentifiedImageError:
            raise UsageError(
                f"{name}: it is no image, or damaged at its start; wanted one of {', '.join(known)}"
            ) from None
        except Exception as error:  # decoders raise whatever they meet in a damaged file
            raise _undecodable(name, error) from None
        with image:
            return _decoded(image, name)


def _read(path: Path, name: str) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{name}: it is no regular file")
        if status.st_size > MOST_BYTES:
            raise UsageError(f"{name}: seen {status.st_size} bytes, wanted at most {MOST_BYTES}")
        with path.open("rb") as file:
            return file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # a path that holds a zero byte is a ValueError
        raise UsageError(f"{name}: {getattr(error, 'strerror', None) or error}") from None


def _undecodable(name: str, error: Exception) -> UsageError:
    detail = printable(str(error)[:200])
    return UsageError(f"{name}: it cannot be decoded ({detail or type(error).__name__})", hint="is the file whole?")


def _decoded(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise UsageError(f"{name}: seen {width} × {height} pixels, wanted at least 1 × 1")
    if width * height > MOST_PIXELS:  # said by the file's header: nothing is decoded yet
        raise UsageError(f"{name}: seen {width} × {height} pixels, wanted at most {MOST_PIXELS} in all")
    try:
        image.load()
        turn = UPRIGHT.get(_orientation(image))
        plain = _rgb(image, name)
        return plain if turn is None else plain.transpose(turn)
    except UsageError:
        raise
    except Exception as error:  # as above
        raise _undecodable(name, error) from None


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged metadata makes no image unreadable
        return None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """8 bits of red, green and blue; what is transparent lies on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _rgb_of_16_bits(image, name)
    if image.mode == "F":
        raise UsageError(f"{name}: seen grey values in floating point, wanted 8 or 16 bits")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, seen).convert("RGB")
    return image.convert("RGB")


def _rgb_of_16_bits(image: Image.Image, name: str) -> Image.Image:
    """Of 16 bits of grey, tile by tile: a small file can hold a large image, and numpy looks up by 64-bit indices."""
    plain = Image.new("RGB", image.size)
    for top in range(0, image.height, TILE):
        for left in range(0, image.width, TILE):
            box = (left, top, min(left + TILE, image.width), min(top + TILE, image.height))
            values = np.asarray(image.crop(box))
            if values.min() < 0 or values.max() > 0xFFFF:  # of mode I
                raise UsageError(f"{name}: seen grey values beyond 16 bits, wanted 8 or 16")
            plain.paste(Image.fromarray(GREYS[values]), box)
    return plain


def _fitted(image: Image.Image, wanted: ImageFormat, name: str) -> Array:
    """Resized, then cut out of the middle; what the middle lacks is black. As PilBackend of transformers."""
    width, height = image.size
    if isinstance(wanted.resize, int):
        short, long = sorted(image.size)
        grown = int(wanted.resize * long / short)
        if grown * wanted.resize > MOST_PIXELS:
            raise UsageError(
                f"{name}: seen {width} × {height} pixels, too long and narrow for a model that makes the shorter "
                f"side {wanted.resize}"
            )
        height, width = (grown, wanted.resize) if width <= height else (wanted.resize, grown)
    else:
        height, width = wanted.resize
    resized = np.asarray(image.resize((width, height), Image.Resampling(wanted.resample)))  # [height, width, 3]
    fitted = np.zeros((wanted.height, wanted.width, 3), np.uint8)
    rows, into_rows = _middle(height, wanted.height)
    columns, into_columns = _middle(width, wanted.width)
    fitted[into_rows, into_columns] = resized[rows, columns]
    return fitted


def _middle(length: int, wanted: int) -> tuple[slice, slice]:
    """Which part of a side is taken, and where it goes."""
    if length >= wanted:
        start = (length - wanted) // 2
        return slice(start, start + wanted), slice(0, wanted)
    start = -(-(wanted - length) // 2)
    return slice(0, length), slice(start, start + length)
