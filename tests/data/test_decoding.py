# SPDX-License-Identifier: Apache-2.0
"""Pixels of image files: those of pillow, whoever decodes them."""

import io
import random
import warnings

import numpy as np
import pytest
import torch
import torchvision.io
from PIL import Image, ImageOps
from torch.testing import assert_close

from detr_fast.data.images import MISSING, UNREADABLE, UnusableImage, check_image, read_image

HEIGHT, WIDTH = 37, 53
ANY = (0, 0)
# libjpeg-turbo decodes for both, bit for bit; another build of either may round its own way
ROUNDING = 1


def photo():
    """A smooth picture with edges, in colour and with transparency."""
    coarse = np.random.default_rng(0).integers(0, 256, (10, 14, 4), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def encoded(mode, suffix, **options):
    file = io.BytesIO()
    image = photo() if mode == "RGBA" else photo().convert("RGB")
    if mode == "I;16":
        image = Image.fromarray(
            (33 * np.arange(HEIGHT * WIDTH, dtype=np.uint16)).reshape(HEIGHT, WIDTH)
        )
    elif mode == "P":
        image = image.quantize(20)
    else:
        image = image.convert(mode)
    image.save(file, format=suffix, **options)
    return file.getvalue()


def pixels_of(image):
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def pillow(content, turn=False):
    image = Image.open(io.BytesIO(content))
    if image.mode == "I;16":  # which convert() would cut off at 255
        image = Image.fromarray((np.array(image) / 257).round().astype(np.uint8))
    return pixels_of(ImageOps.exif_transpose(image) if turn else image)


@pytest.fixture
def jpegs(monkeypatch):
    """Counts what torchvision decodes."""
    decode, calls = torchvision.io.decode_jpeg, []

    def counted(*args, **options):
        calls.append(args)
        return decode(*args, **options)

    monkeypatch.setattr(torchvision.io, "decode_jpeg", counted)
    return calls


@pytest.fixture
def read(tmp_path):
    def read(content, size=ANY):
        (tmp_path / "image").write_bytes(content)
        return read_image(tmp_path / "image", size)

    return read


@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"quality": 95, "subsampling": 0}),
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"keep_rgb": True}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "MPO", {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT))]}),
        *((mode, "PNG", {}) for mode in ("RGB", "RGBA", "L", "LA", "1", "P", "I;16")),
        ("P", "PNG", {"transparency": 3}),
        ("L", "PNG", {"transparency": 7}),
        *(("RGB", suffix, {}) for suffix in ("BMP", "GIF", "TIFF", "WEBP", "PPM")),
        ("CMYK", "TIFF", {}),
        ("RGBA", "WEBP", {"lossless": True}),
    ],
    ids=str,
)
def test_pixels_are_those_of_pillow(read, jpegs, mode, suffix, options):
    content = encoded(mode, suffix, **options)
    image = read(content, (HEIGHT, WIDTH))
    assert image.dtype == torch.uint8
    assert image.shape == (3, HEIGHT, WIDTH)
    assert image.stride() == (1, 3 * WIDTH, 3)  # as it is resized fastest
    assert len(jpegs) == (suffix in ("JPEG", "MPO"))
    atol = ROUNDING if suffix in ("JPEG", "MPO") else 0
    assert_close(image, pillow(content), atol=atol, rtol=0)


def test_real_images(test_data):
    for path in sorted((test_data / "coco125/val2017").iterdir()):
        assert_close(read_image(path, ANY), pillow(path.read_bytes()), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["JPEG", "PNG"])
def test_only_a_quarter_turn_that_is_annotated_is_made(read, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded("RGB", suffix, exif=exif)
    for size in (ANY, (HEIGHT, WIDTH)):
        assert_close(read(content, size), pillow(content), atol=ROUNDING, rtol=0)
    if orientation < 5:
        with pytest.raises(UnusableImage, match=f"has {WIDTH} x {HEIGHT} pixels, not 37 x 53"):
            read(content, (WIDTH, HEIGHT))
    else:
        turned = read(content, (WIDTH, HEIGHT))
        assert_close(turned, pillow(content, turn=True), atol=ROUNDING, rtol=0)


def test_turn_that_only_pillow_knows_of(read, jpegs):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    content = encoded("RGB", "JPEG", xmp=xmp)
    turned = read(content, (WIDTH, HEIGHT))
    assert_close(turned, pillow(content, turn=True), atol=ROUNDING, rtol=0)
    assert len(jpegs) == 1


@pytest.mark.parametrize("how", ["refuses", "is without decoders", "warns"])
def test_where_torchvision_does_not_decode(read, monkeypatch, how):
    def refuse(*args, **options):
        raise RuntimeError("no")

    content = encoded("RGB", "JPEG")
    if how == "refuses":
        monkeypatch.setattr(torchvision.io, "decode_jpeg", refuse)
    elif how == "is without decoders":
        monkeypatch.delattr(torchvision.io, "decode_jpeg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(read(content), pillow(content), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("suffix", ["JPEG", "PNG"])
def test_a_file_that_is_cut_off_is_described_by_pillow(read, tmp_path, suffix, share):
    content = encoded("RGB", suffix)
    content = content[: int(share * len(content))]
    with pytest.raises(UnusableImage, match=r"^cannot be decoded \(") as caught:
        read(content)
    assert caught.value.kind == UNREADABLE
    path = tmp_path / "image"
    with pytest.raises((OSError, SyntaxError)) as of_pillow, Image.open(path) as image:
        image.load()
    assert str(caught.value) == f"cannot be decoded ({of_pillow.value})"
    with pytest.raises(UnusableImage) as of_check:
        check_image(path, ANY)
    assert of_check.value.kind == UNREADABLE
    path.unlink()
    with pytest.raises(UnusableImage, match=r"^is missing$") as missing:
        read_image(path, ANY)
    assert missing.value.kind == MISSING


def damaged(content, generator):
    content = bytearray(content)
    choice = generator.random()
    if choice < 0.15:
        return bytes(content[: generator.randrange(len(content))])
    if choice < 0.3:
        first = generator.randrange(len(content))
        del content[first : first + generator.randrange(1, 60)]
    for _ in range(generator.randint(1, 4)):
        content[generator.randrange(len(content))] = generator.choice([0, 255, 77])
    return bytes(content)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str
)
def test_damaged_files_are_read_where_pillow_reads_them(read, options):
    content, generator = encoded("RGB", "JPEG", **options), random.Random(0)
    accepted = 0
    for _ in range(200):
        broken = damaged(content, generator)
        try:
            expected = pillow(broken)
        except Exception:
            with pytest.raises(UnusableImage):
                read(broken)
            continue
        if expected.numel() < 1e6:
            accepted += 1
            assert_close(read(broken), expected, atol=ROUNDING, rtol=0)
    assert accepted > 30
