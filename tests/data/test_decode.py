"""Decoding: every way a picture is stored, and every way it is broken."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from trivium.data import decode as decode_module
from trivium.data.decode import DecodeError, decode, picture_size


def encoded(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(height: int = 24, width: int = 40) -> np.ndarray:
    """Smooth and different in every corner, so that JPEG keeps it and a turned copy shows."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [rows * 200 / height, columns * 200 / width, (rows + columns) * 100 / (height + width) + 50]
    return np.stack(channels, axis=-1).astype(np.uint8)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pillow":
        monkeypatch.setattr(decode_module, "simplejpeg", None)
    return request.param


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_give_the_very_pixels(format: str, options: dict[str, object]) -> None:
    pixels = gradient()
    assert np.array_equal(decode(encoded(Image.fromarray(pixels), format, **options)), pixels)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 2, "progressive": True}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_both_jpeg_decoders_give_the_same_pixels(
    mode: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(Image.fromarray(gradient(67, 41)).convert(mode), "JPEG", quality=90, **options)
    fast = decode(data)
    monkeypatch.setattr(decode_module, "simplejpeg", None)
    assert np.array_equal(fast, decode(data))
    assert fast.shape == (67, 41, 3)


def test_transparency_lies_on_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (255, 0, 0, 255)
    rgba[0, 1] = (0, 0, 255, 0)  # blue, but invisible
    rgba[1, 0] = (0, 0, 0, 128)
    pixels = decode(encoded(Image.fromarray(rgba), "PNG"))
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[0, 1].tolist() == [255, 255, 255]
    assert pixels[1, 0].tolist() == [127, 127, 127]


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette_with_a_transparent_entry(format: str) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putdata([0, 1])
    assert decode(encoded(picture, format))[0].tolist() == [[10, 20, 30], [200, 100, 50]]
    assert decode(encoded(picture, format, transparency=0))[0].tolist() == [[255, 255, 255], [200, 100, 50]]


def test_grey_with_alpha_and_one_bit() -> None:
    grey = Image.merge("LA", (Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 0)))
    assert decode(encoded(grey, "PNG")).tolist() == [[[255, 255, 255]]]
    assert decode(encoded(Image.new("1", (1, 1), 1), "PNG")).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(format: str) -> None:
    deep = np.array([[0, 255, 257, 32768, 65280, 65535]], np.uint16)
    pixels = decode(encoded(Image.fromarray(deep), format))
    assert pixels[0, :, 0].tolist() == np.rint(deep[0] / 257).astype(int).tolist() == [0, 1, 1, 128, 254, 255]
    assert (pixels == pixels[..., :1]).all()


def test_pixels_of_unknown_range_are_refused() -> None:
    with pytest.raises(DecodeError, match="floating-point"):
        decode(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))
    with pytest.raises(DecodeError, match="16 bits"):
        decode(encoded(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF"))


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format: str) -> None:
    """Pillow writes JPEGs as Adobe does, with inverted inks: taken as they stand they would be negatives."""
    picture = Image.new("CMYK", (16, 16), (0, 200, 200, 10))  # red
    data = encoded(picture, format)
    assert (b"Adobe" in data) == (format == "JPEG")
    red, green, blue = decode(data)[8, 8].astype(int)
    assert red > 230
    assert green < 70
    assert blue < 70


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation(format: str, orientation: int, decoder: str) -> None:
    """`shown` is what the photographer saw; the file stores it turned and says how to turn it back."""
    shown = Image.fromarray(gradient())
    methods = Image.Transpose
    stored_by = {
        2: methods.FLIP_LEFT_RIGHT,
        3: methods.ROTATE_180,
        4: methods.FLIP_TOP_BOTTOM,
        5: methods.TRANSPOSE,
        6: methods.ROTATE_90,
        7: methods.TRANSVERSE,
        8: methods.ROTATE_270,
    }
    stored = shown.transpose(stored_by[orientation]) if orientation in stored_by else shown
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 98, "subsampling": 0} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    pixels = decode(encoded(stored, format, exif=exif, **options))
    assert pixels.shape == (24, 40, 3)
    assert np.abs(pixels.astype(int) - np.asarray(shown)).max() <= 4


def test_broken_exif_leaves_the_picture_as_it_is(decoder: str) -> None:
    data = encoded(Image.fromarray(gradient()), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data).shape == (24, 40, 3)


def photograph(height: int, width: int) -> np.ndarray:
    """Waves of every length in each channel, the long ones higher, as in what a camera makes."""
    rows, columns = np.mgrid[0:height, 0:width]
    lengths = {2: 6, 5: 10, 13: 16, 40: 26, 150: 40}  # of a wave, in pixels by 2 pi, and its height
    waves = [high * np.sin(rows / length + columns / (length + 1)) for length, high in lengths.items()]
    channels = [sum(np.roll(wave, 7 * c) for wave in waves) + 128 for c in range(3)]
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "min_side", "expected"),
    [
        ((768, 1024), 273, (384, 512)),
        ((768, 1024), 192, (192, 256)),
        ((767, 1023), 95, (96, 128)),  # libjpeg rounds up
        ((500, 333), 167, (500, 333)),
        ((500, 333), 166, (250, 167)),
        ((30, 40), 1, (4, 5)),
        ((300, 300), None, (300, 300)),
    ],
)
def test_a_large_jpeg_is_decoded_as_small_as_it_may_be(
    shape: tuple[int, int], min_side: int | None, expected: tuple[int, int], decoder: str
) -> None:
    data = encoded(Image.fromarray(photograph(*shape)), "JPEG", quality=90)
    assert decode(data, min_side=min_side).shape[:2] == expected


def test_both_decoders_reduce_to_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    for options in ({}, {"exif": turned}, {"progressive": True, "subsampling": 0}):
        for mode in ("RGB", "L"):
            data = encoded(Image.fromarray(photograph(203, 157)).convert(mode), "JPEG", quality=85, **options)
            with monkeypatch.context() as patch:
                fast = decode(data, min_side=70)
                patch.setattr(decode_module, "simplejpeg", None)
                assert np.array_equal(fast, decode(data, min_side=70))
            assert fast.shape == ((79, 102, 3) if options.get("exif") else (102, 79, 3))


def test_a_reduced_picture_is_the_picture() -> None:
    """Reduced and then resized, against resized alone: 1 of 255 on average, at no pixel more than 12."""
    data = encoded(Image.fromarray(photograph(768, 1024)), "JPEG", quality=90)
    whole, reduced = decode(data), decode(data, min_side=273)
    views = [
        np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)) for pixels in (whole, reduced)
    ]
    difference = np.abs(views[0].astype(int) - views[1])
    assert difference.mean() < 1
    assert difference.max() <= 12


def test_what_is_refused_whole_is_refused_reduced(decoder: str) -> None:
    data = encoded(Image.fromarray(photograph(400, 400)), "JPEG")
    with pytest.raises(DecodeError, match="damaged"):
        decode(data[: len(data) // 2], min_side=50)
    with pytest.raises(DecodeError, match="more than the 100,000 allowed"):
        decode(data, max_pixels=100_000, min_side=50)
    png = encoded(Image.fromarray(gradient(64, 64)), "PNG")
    assert np.array_equal(decode(png, min_side=8), gradient(64, 64))  # other formats are read whole


@pytest.mark.filterwarnings("error")
def test_a_huge_header_is_refused_before_memory_is_taken() -> None:
    jpeg = bytearray(encoded(Image.fromarray(gradient()), "JPEG"))
    size_at = jpeg.index(b"\xff\xc0") + 5
    jpeg[size_at : size_at + 4] = struct.pack(">HH", 50_000, 50_000)
    for data in (png_header(50_000, 50_000), bytes(jpeg), png_header(10_000, 10_000)):
        tracemalloc.start()
        with pytest.raises(DecodeError, match=r"header claims.*64,000,000 allowed"):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


def test_the_cap_is_on_the_pixels_not_on_a_side() -> None:
    data = encoded(Image.new("RGB", (100, 10)), "PNG")
    assert decode(data, max_pixels=1000).shape == (10, 100, 3)
    with pytest.raises(DecodeError, match=r"100 x 10 pixels, more than the 999 allowed"):
        decode(data, max_pixels=999)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_pictures_are_refused(format: str, share: float, decoder: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    data = encoded(Image.fromarray(noise), format)
    with pytest.raises(DecodeError, match=r"damaged|no picture"):
        decode(data[: int(share * len(data))])


def test_a_jpeg_without_its_last_bytes_is_refused(decoder: str) -> None:
    data = encoded(Image.fromarray(gradient()), "JPEG")
    with pytest.raises(DecodeError, match="damaged"):
        decode(data[:-2])


def test_zero_bytes_and_garbage() -> None:
    with pytest.raises(DecodeError, match="zero bytes"):
        decode(b"")
    for garbage in (b"<html>404</html>", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", bytes(1000)):
        with pytest.raises(DecodeError):
            decode(garbage)
    with pytest.raises(DecodeError, match="no picture in a format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")  # Pillow would start Ghostscript


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF"]), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)))
)
def test_damage_anywhere_gives_pixels_or_a_decode_error_and_no_warning(
    format: str, damage: list[tuple[float, int]]
) -> None:
    data = bytearray(encoded(Image.fromarray(gradient(9, 7)), format))
    for position, value in damage:
        data[int(position * (len(data) - 1))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            pixels = decode(bytes(data), max_pixels=1_000_000)
        except DecodeError:
            return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


def test_picture_size_reads_the_header_alone() -> None:
    assert picture_size(encoded(Image.new("RGB", (30, 20)), "PNG")[:60]) == (20, 30)
    with pytest.raises(DecodeError, match="no picture"):
        picture_size(b"nothing")


def test_what_belongs_to_the_whole_process_is_left_alone() -> None:
    before = (list(warnings.filters), Image.MAX_IMAGE_PIXELS)
    decode(encoded(Image.new("RGB", (3, 3)), "PNG"))
    with pytest.raises(DecodeError):
        decode(png_header(20_000, 20_000))
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == before
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
