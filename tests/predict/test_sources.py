# SPDX-License-Identifier: Apache-2.0
"""Every kind of input gives the pixels that a person sees."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from time import sleep
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.config import UsageError
from detr_fast.data.images import UnusableImage, read_upright
from detr_fast.predict.sources import find_sources, is_one, read
from tests.predict.conftest import turned
from tests.programs import program


def pixels(images):
    return [source.load().permute(1, 2, 0).numpy() for source in find_sources(images)]


def assert_scene(images, scene, count=1):
    found = pixels(images)
    assert len(found) == count
    for image in found:
        np.testing.assert_array_equal(image, scene)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_photos_are_upright(tmp_path, scene, orientation, ending):
    image, exif = turned(scene, orientation)
    path = tmp_path / f"photo.{ending}"
    image.save(path, exif=exif, quality=100, subsampling=0)
    found = read_upright(path).permute(1, 2, 0).numpy()
    assert found.shape == scene.shape
    assert np.abs(found.astype(int) - scene).max() <= (0 if ending == "png" else 12)


def test_images_in_memory(scene):
    image = torch.from_numpy(scene).permute(2, 0, 1)
    for one in (scene, image, image.double() / 255, Image.fromarray(scene)):
        assert is_one(one)
        assert_scene(one, scene)
    with_alpha = np.concatenate([scene, scene[..., :1]], axis=2)
    assert_scene(with_alpha, scene)
    for several in ([scene, image], np.stack([scene] * 2), image.expand(2, -1, -1, -1)):
        assert not is_one(several)
        assert_scene(several, scene, count=2)
    assert_scene(iter([scene]), scene)


def test_a_picture_of_pillow_says_how_it_is_turned(tmp_path, scene):
    image, exif = turned(scene, 8)
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        assert_scene(opened, scene)


def test_grey_images(scene):
    grey = scene[..., 0]
    three = np.stack([grey] * 3, axis=2)
    for one in (grey, grey[..., None], torch.from_numpy(grey)[None], Image.fromarray(grey)):
        assert_scene(one, three)
    assert_scene(Image.fromarray(grey.astype(np.uint16) * 257), three)


def test_files_folders_and_patterns(dirty_folder, scene, monkeypatch):
    names = [source.file for source in find_sources(dirty_folder)]
    expected = ["below/grey", "cmyk", "corrupt", "pixel", "plain", "sixteen", "turned"]
    assert sorted(names) == expected
    assert_scene(dirty_folder / "plain.png", scene)
    assert_scene(str(dirty_folder / "*in.png"), scene)
    assert len(pixels(str(dirty_folder / "**" / "*y.png"))) == 1
    monkeypatch.chdir(dirty_folder)
    [source] = find_sources("below/../plain.png")
    assert source.file == "plain"
    assert_scene(["plain.png", scene], scene, count=2)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("nowhere.png", UsageError, r"nowhere\.png: no such file or folder"),
        ("no*where.png", UsageError, "no image fits this pattern"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"expected an array \(H, W, 3\)"),
        (np.zeros((4, 4, 3)), TypeError, "expected an array of uint8, got float64"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"got shape \(0, 4, 3\)"),
        (torch.zeros(4, 4, 3), ValueError, r"expected a tensor \(3, H, W\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.full((3, 4, 4), 1.5), ValueError, r"are in \[0, 1\], not normalised"),
        (torch.full((3, 4, 4), torch.nan), ValueError, r"are in \[0, 1\]"),
        (3.5, TypeError, "got float"),
        ([3.5], TypeError, "image 0: expected a path"),
    ],
)
def test_what_is_no_image_is_said(images, error, message):
    with pytest.raises(error, match=message):
        pixels(images)


def test_an_empty_folder_is_a_mistake(tmp_path):
    with pytest.raises(UsageError, match="no image in this folder"):
        pixels(tmp_path)


def test_a_file_that_is_gone(tmp_path, scene):
    Image.fromarray(scene).save(tmp_path / "a.png")
    [source] = find_sources(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UnusableImage, match="is missing"):
        source.load()


def test_generated_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = list(find_sources("shapes"))
    assert len(found) == 500
    assert found[3].name == "shapes/3"
    assert found[3].load().shape == (3, 128, 128)
    assert not torch.equal(found[3].load(), found[4].load())


class Frames(list):
    """What torchcodec's decoder looks like."""

    def __init__(self, path):
        if "broken" in path:
            raise RuntimeError("no stream\nmore")
        super().__init__(torch.full((3, 4, 6), number, dtype=torch.uint8) for number in range(3))
        self.reading = False

    def __getitem__(self, number):
        assert not self.reading, "two threads at once"
        self.reading = True
        sleep(0.02)
        self.reading = False
        if number == 2:
            raise RuntimeError("a torn frame\nmore")
        return super().__getitem__(number)


@pytest.fixture
def torchcodec(monkeypatch):
    package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    package.decoders, decoders.VideoDecoder = decoders, Frames
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)


@pytest.mark.usefixtures("torchcodec")
def test_frames_of_a_video(tmp_path):
    (clip := tmp_path / "clip.MP4").write_bytes(b"")
    assert not is_one(clip)
    found = list(find_sources(clip))
    assert [source.file for source in found] == [f"clip.MP4/{number:06}" for number in range(3)]
    with ThreadPoolExecutor(3) as threads:
        *images, torn = threads.map(read, found)
    assert [int(image.max()) for image in images] == [0, 1]
    assert str(torn) == "cannot be decoded (a torn frame)"
    (tmp_path / "broken.mp4").write_bytes(b"")
    with pytest.raises(UsageError, match=r"cannot be decoded \(no stream\)"):
        list(find_sources(tmp_path / "broken.mp4"))


def test_frames_of_a_real_video_in_several_threads(tmp_path):
    levels = [20 * number for number in range(12)]
    for number, level in enumerate(levels):
        picture = np.full((64, 96, 3), (level, 128, 255 - level), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{number:02}.png")
    clip = tmp_path / "clip.mp4"
    encode = [program("ffmpeg", "ffmpeg"), "-loglevel", "error", "-i", str(tmp_path / "%02d.png")]
    subprocess.run([*encode, "-c:v", "mpeg4", "-q:v", "1", str(clip)], check=True)
    with ThreadPoolExecutor(4) as threads:
        frames = list(threads.map(read, find_sources(clip)))
    assert [tuple(frame.shape) for frame in frames] == [(3, 64, 96)] * 12
    means = torch.stack([frame.float().mean((1, 2)) for frame in frames])
    wanted = torch.tensor([[level, 128, 255 - level] for level in levels])
    assert (means - wanted).abs().max() < 12


def test_without_torchcodec_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    (clip := tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(UsageError, match=r"detr-fast\[video\]"):
        list(find_sources(clip))
