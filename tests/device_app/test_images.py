"""Images: the pixels of the stock image processors, or one error that names the file."""

from __future__ import annotations

import io
import os
import socket
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from device_app import images
from device_app.images import MOST_PIXELS, open_image, pixels
from shared.errors import UsageError
from shared.manifest import ImageFormat
from tests.thorough import examples

VIT = ImageFormat(height=32, width=32, resize=(32, 32), resample=2, patches=4)
CLIP = ImageFormat(height=28, width=28, resize=28, resample=3, patches=4)
PLAIN = ImageFormat(height=8, width=8, resize=(8, 8), resample=0, patches=1)


def photo(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise under a few shapes, so that no filter, cut or turn leaves it as it was."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(values)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width // 3, height // 2), fill=(250, 10, 30))
    draw.rectangle((width // 2, height // 2, width, height), fill=(10, 60, 240))
    return image.convert(mode)


def written(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def stock(processor: Any, image: Image.Image) -> np.ndarray:
    """[height, width, 3], what a stock processor makes before it turns to floats."""
    made = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    return np.moveaxis(np.asarray(made), 0, -1)


SIZES = [(32, 32), (64, 48), (48, 64), (7, 5), (1, 1), (33, 31), (200, 3), (3, 200), (640, 480), (1, 40), (29, 28)]


# --- as the stock processors ---


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
def test_pixels_are_those_of_the_stock_vit_processor(size: tuple[int, int], resample: int) -> None:
    processor = ViTImageProcessorPil(size={"height": 24, "width": 40}, resample=resample)
    form = ImageFormat(height=24, width=40, resize=(24, 40), resample=resample, patches=4)
    expected = stock(processor, photo(*size))
    assert expected.dtype == np.uint8
    assert np.array_equal(pixels(photo(*size), form), expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("shorter", "cut"), [(28, (28, 28)), (32, (28, 28)), (29, (28, 27)), (20, (28, 24)), (9, (9, 9))]
)
def test_pixels_are_those_of_the_stock_clip_processor(
    size: tuple[int, int], shorter: int, cut: tuple[int, int]
) -> None:
    height, width = cut
    processor = CLIPImageProcessorPil(size={"shortest_edge": shorter}, crop_size={"height": height, "width": width})
    form = ImageFormat(height=height, width=width, resize=shorter, resample=3, patches=4)
    assert np.array_equal(pixels(photo(*size), form), stock(processor, photo(*size)))


def test_pixels_are_those_of_the_stock_processors_at_their_own_sizes() -> None:
    image = photo(500, 333)
    vit = ImageFormat(height=224, width=224, resize=(224, 224), resample=2, patches=197)
    clip = ImageFormat(height=224, width=224, resize=224, resample=3, patches=50)
    assert np.array_equal(pixels(image, vit), stock(ViTImageProcessorPil(), image))
    assert np.array_equal(pixels(image, clip), stock(CLIPImageProcessorPil(), image))


@settings(max_examples=examples(100), deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 50), st.integers(1, 50), st.integers(1, 50))
def test_any_shape_is_resized_and_cut_as_stock(width: int, height: int, shorter: int, high: int, wide: int) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": shorter}, crop_size={"height": high, "width": wide})
    form = ImageFormat(height=high, width=wide, resize=shorter, resample=3, patches=1)
    assert np.array_equal(pixels(photo(width, height), form), stock(processor, photo(width, height)))


# --- files of all kinds ---


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF", "JPEG", "JPEG2000", "AVIF"])
def test_every_format_gives_the_pixels_that_pillow_decodes(form: str, tmp_path: Path) -> None:
    options = {"WEBP": {"lossless": True}}.get(form, {})
    data = written(photo(40, 30), form, **options)
    (tmp_path / "photo").write_bytes(data)  # no suffix: the content decides
    with Image.open(io.BytesIO(data)) as image:
        expected = pixels(image.convert("RGB"), VIT)
    for source in (data, tmp_path / "photo", str(tmp_path / "photo")):
        seen = pixels(source, VIT)
        assert np.array_equal(seen, expected)
        assert (seen.dtype, seen.shape) == (np.uint8, (32, 32, 3))
    if form in ("PNG", "BMP", "TIFF", "PPM", "WEBP"):
        assert np.array_equal(seen, pixels(photo(40, 30), VIT))


@pytest.mark.parametrize("suffix", [".jpg", ".txt", ".PNG", ""])
def test_the_content_counts_and_not_the_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"photo{suffix}"
    path.write_bytes(written(photo(20, 10), "PNG"))
    assert np.array_equal(pixels(path, VIT), pixels(photo(20, 10), VIT))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = photo(40, 30, mode)
    assert np.array_equal(pixels(image, VIT), pixels(image.convert("RGB"), VIT))


def test_a_cmyk_jpeg_has_its_colours() -> None:
    red = Image.new("RGB", (16, 16), (220, 20, 20)).convert("CMYK")
    seen = pixels(written(red, "JPEG", quality=100), PLAIN)
    assert (np.abs(seen.astype(int) - (220, 20, 20)) < 12).all()


def sixteen(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint16))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_of_grey_are_scaled_and_not_cut(form: str) -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8)
    seen = pixels(written(sixteen(values), form), PLAIN)
    expected = np.round(values.astype(np.uint16) / 257)
    assert np.array_equal(seen, np.repeat(expected[..., None], 3, -1))
    assert seen.min() == 0 and seen.max() == 255


def test_16_bits_as_whole_numbers_are_scaled_too_and_more_are_refused() -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.int32)
    assert np.array_equal(pixels(Image.fromarray(values), PLAIN), pixels(sixteen(values), PLAIN))
    for wrong in (values * 2, values - 1):
        with pytest.raises(UsageError, match="beyond 16 bits"):
            pixels(Image.fromarray(wrong), PLAIN)
    with pytest.raises(UsageError, match="floating point"):
        pixels(Image.fromarray(np.zeros((8, 8), np.float32)), PLAIN)


@pytest.mark.parametrize("size", [(1, 1), (1025, 3), (3, 1025), (1024, 1024), (2100, 1100)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bits_of_grey_are_rounded_everywhere(size: tuple[int, int], dtype: type) -> None:
    values = np.random.default_rng(1).integers(0, 65536, size[::-1])
    seen = np.asarray(open_image(Image.fromarray(values.astype(dtype))))
    assert np.array_equal(seen, np.repeat(((values + 128) // 257)[..., None], 3, -1))


def test_a_small_file_with_a_large_image_of_16_bits_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    sixteen(np.zeros((8191, 8192))).save(path)  # 128 MiB decoded, 256 MiB in RGB
    measure = (
        "import re, sys; from pathlib import Path; from device_app.images import open_image; "
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]); "
        "before = peak(); open_image(sys.argv[1]); print((peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", measure, str(path)], capture_output=True, text=True, check=True)
    assert path.stat().st_size < 2**20
    assert 380 < float(done.stdout) < 440  # MiB


def see_through(mode: str) -> Image.Image:
    """Left opaque red (or grey), middle half, right quite transparent."""
    image = Image.new("RGBA", (9, 9), (200, 0, 0, 255))
    image.paste((200, 0, 0, 128), (3, 0, 6, 9))
    image.paste((200, 0, 0, 0), (6, 0, 9, 9))
    return image.convert(mode)


@pytest.mark.parametrize(("mode", "opaque"), [("RGBA", (200, 0, 0)), ("LA", (60, 60, 60))])
@pytest.mark.parametrize("form", ["PNG", "WEBP", None])
def test_what_is_transparent_lies_on_white(mode: str, opaque: tuple[int, ...], form: str | None) -> None:
    image = see_through(mode)
    form_9 = ImageFormat(height=9, width=9, resize=(9, 9), resample=0, patches=1)
    source: Any = image if form is None else written(image, form, **({"lossless": True} if form == "WEBP" else {}))
    seen = pixels(source, form_9).astype(int)
    assert (np.abs(seen[:, :3] - opaque) <= 1).all()
    half = 255 - (255 - np.array(opaque)) * 128 / 255
    assert (np.abs(seen[:, 3:6] - half) <= 2).all()
    assert (seen[:, 6:] == 255).all()


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_lies_on_white(form: str) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 255, 0, 200, 0, 0, 0, 0, 255])
    image.paste(0, (4, 0, 8, 8))
    seen = pixels(written(image, form, transparency=0), PLAIN)
    assert (seen[:, :4] == (200, 0, 0)).all() and (seen[:, 4:] == 255).all()


def test_a_transparent_colour_of_a_plain_png_lies_on_white() -> None:
    image = Image.new("RGB", (8, 8), (200, 0, 0))
    image.paste((1, 2, 3), (4, 0, 8, 8))
    seen = pixels(written(image, "PNG", transparency=(1, 2, 3)), PLAIN)
    assert (seen[:, :4] == (200, 0, 0)).all() and (seen[:, 4:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photo_is_turned_upright(orientation: int, form: str) -> None:
    upright = photo(48, 32)
    # What a camera stores so that a viewer which follows the tag shows `upright`.
    stored = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    seen = open_image(written(stored, form, exif=exif, **options))
    assert seen.size == upright.size
    difference = np.abs(np.asarray(seen).astype(int) - np.asarray(upright))
    assert difference.mean() < (12 if form == "JPEG" else 1e-9)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_is_none_turns_nothing(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    data = written(photo(48, 32), "PNG", exif=exif)
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(photo(48, 32)))


def test_damaged_exif_makes_no_image_unreadable() -> None:
    data = written(photo(48, 32), "JPEG", exif=b"Exif\x00\x00" + b"MM\x00*" + b"\xff" * 40)
    with Image.open(io.BytesIO(written(photo(48, 32), "JPEG"))) as expected:
        assert np.array_equal(np.asarray(open_image(data)), np.asarray(expected))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    seen = pixels(written(frames[0], form, save_all=True, append_images=frames[1:]), PLAIN).astype(int)
    assert (np.abs(seen - (250, 0, 0)) <= 8).all()


def test_an_image_of_pillows_is_not_changed() -> None:
    image = photo(40, 30, "RGBA")
    before = image.copy()
    pixels(image, VIT)
    assert (image.mode, image.size) == (before.mode, before.size) and image == before


# --- what is no image, or too much of one ---


def refused(source: Any, match: str, form: ImageFormat = VIT) -> str:
    """The one error, which names the file if there is one; no warning besides."""
    with warnings.catch_warnings(), pytest.raises(UsageError, match=match) as raised:
        warnings.simplefilter("error")
        pixels(source, form)
    assert raised.value.__cause__ is None and str(raised.value).isprintable()
    assert isinstance(source, (bytes, Image.Image)) or str(source) in str(raised.value)
    return str(raised.value)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "missing.jpg", "No such file")
    refused(tmp_path, "no regular file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no regular file")
    refused("/dev/zero", "no regular file")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        refused(tmp_path / "socket", "no regular file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", "symbolic link|Too many")
    refused("x" * 5000, "too long")


def test_a_name_with_a_zero_byte_or_control_characters_is_one_printable_error() -> None:
    for name in ("a\x00b", "a\nb\x1b[2J", "caf\udce9.jpg"):
        with pytest.raises(UsageError) as raised:
            pixels(name, VIT)
        assert str(raised.value).isprintable()


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = tmp_path / "secret.png"
    path.write_bytes(written(photo(4, 4), "PNG"))
    path.chmod(0)
    refused(path, "Permission denied")


@pytest.mark.parametrize("data", [b"", b"\n", b"hello, I am text", b"%PDF-1.7", b"\xff\xd8", b"GIF89a", bytes(5000)])
def test_what_is_no_image_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    refused(tmp_path / "file", "empty file|no image|cannot be decoded|wanted at least 1")
    with pytest.raises(UsageError):
        pixels(data, VIT)


@pytest.mark.parametrize("form", ["EPS", "TGA", "ICO", "PDF"])
def test_formats_that_run_programs_or_nest_others_are_not_opened(form: str) -> None:
    refused(written(photo(16, 16), form), "no image")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_file_that_was_cut_is_refused(form: str, part: float, tmp_path: Path) -> None:
    data = written(photo(300, 200), form)
    (tmp_path / "cut").write_bytes(data[: int(len(data) * part)])
    refused(tmp_path / "cut", "no image|cannot be decoded")


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG of 8 bits of grey that says it has this size, whatever it holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (100_000, 100_000), (MOST_PIXELS + 1, 1), (10_000, 10_000)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(Image.Image, "load", never)
    refused(png(*size, bytes(1000)), "pixels, wanted at most|decompression bomb")


def test_the_largest_image_is_taken() -> None:
    side = 8192
    assert side * side == MOST_PIXELS
    assert pixels(png(side, side, bytes((side + 1) * side)), PLAIN).max() == 0


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_a_pixel_is_refused(size: tuple[int, int]) -> None:
    refused(Image.new("RGB", size), "wanted at least 1 × 1")
    refused(png(*size), "no image|at least 1|cannot be decoded")


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MOST_BYTES", 1000)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1001)
    refused(tmp_path / "large", "seen 1001 bytes, wanted at most 1000")
    refused(bytes(1001), "seen 1001 bytes, wanted at most 1000")


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (30_000, 2)])
def test_an_image_of_extreme_shape_fits_models_that_squeeze_and_is_refused_by_those_that_cut(
    size: tuple[int, int],
) -> None:
    image = photo(*size)
    assert np.array_equal(pixels(image, VIT), stock(ViTImageProcessorPil(size={"height": 32, "width": 32}), image))
    long = ImageFormat(height=224, width=224, resize=224, resample=3, patches=1)
    assert "too long and narrow" in refused(image, f"seen {size[0]} × {size[1]} pixels", long)


@settings(max_examples=examples(300), deadline=None)
@given(st.data())
def test_a_damaged_file_is_an_image_or_one_error(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000"]))
    content = bytearray(DAMAGED[form])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            seen = pixels(bytes(content), PLAIN)
        except UsageError as error:
            assert str(error).isprintable()
        else:
            assert (seen.shape, seen.dtype) == ((8, 8, 3), np.uint8)


DAMAGED = {form: written(photo(24, 16), form) for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000")}


def test_no_more_than_the_decoders_own_errors_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pixels(Image.new("L", (8, 8)), PLAIN)
