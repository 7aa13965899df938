# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of a small model, and a folder of the images that people have."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.config import Config
from detr_fast.models import detr_tiny

NAMES = {0: "disc", 1: "rectangle", 2: "triangle", 3: "cross"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Weights that find something everywhere, for images with a short side of 96 pixels."""
    torch.manual_seed(0)
    model = detr_tiny()
    with torch.no_grad():  # scores that differ from query to query
        model.class_embed.weight.mul_(4)
    content = {
        "model": model.state_dict(),
        "model_config": asdict(model.config),
        "class_names": NAMES,
        "category_ids": {0: 7, 1: 8, 2: 9, 3: 11},
        "args": asdict(Config(dataset_file="coco", image_size=96)),
    }
    path = tmp_path_factory.mktemp("model") / "checkpoint.pth"
    torch.save(content, path)
    return path


@pytest.fixture(scope="session")
def scene():
    """An RGB picture (ndarray[60, 90, 3]) that has no symmetry."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 60, (60, 90, 3), dtype=np.uint8)
    pixels[5:25, 10:50] = (250, 30, 30)
    pixels[35:55, 60:80] = (20, 240, 100)
    return pixels


def turned(pixels, orientation):
    """The pixels as a camera stores them that says this orientation (EXIF 2.3, 4.6.4.A)."""
    image = Image.fromarray(pixels)
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    image = image if stored is None else image.transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image, exif


@pytest.fixture
def dirty_folder(tmp_path, scene):
    """A corrupt image and the kinds of image that surprise decoders."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    whole = Image.fromarray(scene)
    whole.save(folder / "plain.png")
    whole.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    whole.convert("L").save(folder / "below" / "grey.png")
    Image.fromarray(scene[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.new("RGB", (1, 1), (9, 99, 199)).save(folder / "pixel.png")
    image, exif = turned(scene, 6)
    image.save(folder / "turned.png", exif=exif)
    (folder / "corrupt.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (folder / ".hidden.png").write_bytes(b"nothing")
    (folder / "notes.txt").write_text("nothing to see")
    return folder
