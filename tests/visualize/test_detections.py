# SPDX-License-Identifier: Apache-2.0
"""Detection pictures: colours, places and the limits of each cell, read from the PNG."""

import importlib
import itertools
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import detr_fast.visualize
from detr_fast.visualize import draw_detections
from detr_fast.visualize.canvas import class_color, luminance

NAMES = {0: "disc", 1: "cross", 2: "an extraordinarily long class name with $ and _ in it"}
GREY = 128
# of the grid, in pixels
LEFT, TOP, CELL = 16, 64, 281  # of the first image; four columns


def grey(height=128, width=128):
    return torch.full((3, height, width), GREY, dtype=torch.uint8)


def found(*boxes):
    """Detections from (label, score, x0, y0, x1, y1)."""
    rows = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6)
    return {"labels": rows[:, 0].long(), "scores": rows[:, 1], "boxes": rows[:, 2:]}


def annotated(*boxes):
    """Ground truth from (label, x0, y0, x1, y1)."""
    rows = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5)
    return {"labels": rows[:, 0].long(), "boxes": rows[:, 1:]}


def draw(path, images, detections, **options):
    """The picture as an array (H, W, 3)."""
    draw_detections(images, detections, NAMES, path, **options)
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def has_color(pixels, color, tolerance=6):
    """Which pixels have the colour (the PNG keeps six bits of each channel)."""
    return (np.abs(pixels - 255 * np.array(color)) <= tolerance).all(-1)


def picture_of(pixels, index):
    """The area of one image of 128 x 128 in a grid with four columns."""
    row, column = divmod(index, 4)
    top, left = TOP + row * (CELL + 34), LEFT + column * (CELL + 14)
    return pixels[top : top + CELL, left : left + CELL]


def test_a_box_is_drawn_where_it_is_in_the_colour_of_its_class(tmp_path):
    detections = [found((label, 0.9, 32, 64, 96, 112)) for label in (0, 1)] + [found()] * 2
    pixels = draw(tmp_path / "new" / "grid.png", [grey()] * 4, detections)
    scale = CELL / 128
    for index, label in enumerate((0, 1)):
        area = picture_of(pixels, index)
        edges = has_color(area, class_color(label))
        rows, columns = np.nonzero(edges)
        assert abs(columns.min() - 32 * scale) <= 2
        assert abs(columns.max() - 96 * scale) <= 2
        assert abs(rows.max() - 112 * scale) <= 2
        for y in (64, 112):  # both horizontal lines from corner to corner
            strip = edges[round(y * scale) - 2 : round(y * scale) + 2]
            assert strip[:, round(34 * scale) : round(94 * scale)].any(0).all()
        inside = area[round(70 * scale) : round(106 * scale), round(38 * scale) : round(90 * scale)]
        assert (np.abs(inside - GREY) <= 4).all()
        assert not has_color(area, class_color(1 - label)).any()
    for index in (2, 3):
        assert (np.abs(picture_of(pixels, index) - GREY) <= 4).all()


def test_nothing_leaves_its_picture(tmp_path):
    """Boxes beyond the image, a name too long for it: the paper between the cells stays white."""
    wild = found((2, 0.9, -50, -50, 300, 300), (2, 0.8, 120, 120, 500, 140), (0, 0.7, 0, 0, 2, 2))
    pixels = draw(tmp_path / "grid.png", [grey()] * 8, [wild] * 8)
    empty = pixels.copy()
    for index in range(8):
        picture_of(empty, index)[:] = 255
    captions = empty[:, :LEFT].min(), empty[TOP : TOP + CELL].min()
    assert captions == (255, 255)
    area = picture_of(pixels, 0)
    border = has_color(area, class_color(2))  # the box that is larger than the image frames it
    assert min(border[:4].any(0).mean(), border[:, -4:].any(1).mean()) > 0.5


def test_no_name_leaves_a_picture_narrower_than_itself(tmp_path):
    """281 x 9 pixels hold no name: what does not fit is cut off."""
    pixels = draw(tmp_path / "a.png", [grey(1280, 40)] * 4, [found((0, 0.9, 5, 500, 30, 900))] * 4)
    assert has_color(pixels, class_color(0)).any()
    for column in range(4):
        left = LEFT + column * (CELL + 14)
        assert (pixels[TOP:, left + 10 : left + CELL + 14] == 255).all()


def test_ground_truth_is_dashed_and_named_only_where_it_was_missed(tmp_path):
    truth = [annotated((0, 20, 40, 80, 100)), annotated((0, 20, 40, 80, 100)), annotated()]
    detections = [found((0, 0.9, 22, 42, 82, 102)), found((1, 0.9, 22, 42, 82, 102)), found()]
    pixels = draw(
        tmp_path / "grid.png", [grey()] * 4, [*detections, found()], targets=[*truth, annotated()]
    )
    dark = (0.13, 0.13, 0.13)
    hit, miss, none = (picture_of(pixels, index) for index in range(3))
    for area in (hit, miss):
        side = round(20 * CELL / 128)
        dashes = has_color(area[100:200, side - 1 : side + 2], (1, 1, 1), 60).any(1)
        assert 0.2 < dashes.mean() < 0.8  # neither nothing nor a solid line
        assert np.count_nonzero(np.diff(dashes.astype(int))) > 6
    assert not has_color(hit, dark).any(1).sum() > 10
    assert has_color(miss, dark).any(1).sum() > 10
    assert (np.abs(none - GREY) <= 4).all()


def test_threshold_and_top_k_choose_what_is_drawn(tmp_path):
    boxes = [(0, 0.6 + i / 100, 4 + 12 * i, 40, 12 + 12 * i, 100) for i in range(9)]
    low, unreal = (1, 0.49, 10, 50, 60, 90), (1, 0.9, float("nan"), 50, 60, 90)
    pixels = draw(tmp_path / "grid.png", [grey()], [found(*boxes, low, unreal)], top_k=3)
    assert not has_color(pixels, class_color(1)).any()
    row = has_color(pixels, class_color(0))[TOP + round(99 * 560 / 128)]
    assert np.count_nonzero(np.diff(row.astype(int)) > 0) == 6  # three boxes with two sides
    first = np.nonzero(row)[0][0]
    assert abs(first - LEFT - (4 + 12 * 6) * 560 / 128) < 4
    lower = draw(tmp_path / "grid.png", [grey()], [found(*boxes, low)], threshold=0.4)
    assert has_color(lower, class_color(1)).any()


def test_names_of_one_picture_do_not_cover_one_another(tmp_path):
    """Small boxes at one place: their names stand side by side, as large as the name of one."""
    boxes = [(0, 0.9 - i / 10, 60, 60, 64, 64) for i in range(4)]
    pixels = draw(tmp_path / "grid.png", [grey()] * 2, [found(*boxes), found(boxes[0])], columns=4)
    several, one = has_color(pixels, class_color(0)).reshape(len(pixels), 2, -1).sum((0, 2))
    assert several > 3.2 * one


def test_images_of_all_shapes_keep_their_aspect(tmp_path):
    images = [grey(20, 600), grey(600, 20), grey(1, 1), grey(480, 640), grey(60, 40)]
    pixels = draw(tmp_path / "grid.png", images, [found()] * 5, columns=3)
    is_grey = (np.abs(pixels - GREY) <= 4).all(-1)
    cell = (1200 - 2 * 16 - 2 * 14) // 3
    row = is_grey[TOP + 3]
    wide, tall, dot = (row[16 + i * (cell + 14) :][: cell + 7].sum() for i in range(3))
    assert (wide, tall, dot) == (cell, round(20 * cell / 600), cell)
    column = is_grey[TOP:, 16 + 3]
    first_row = column[: cell + 7].sum()
    assert first_row == round(20 * cell / 600)
    assert pixels.shape[1] <= 1200


def test_a_noisy_page_stays_under_a_megabyte(tmp_path):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(12, 3, 24, 24, generator=generator) * 255
    images = torch.nn.functional.interpolate(coarse, size=(128, 128), mode="bilinear")
    images = (images + 12 * torch.randn(images.shape, generator=generator)).clamp(0, 255).byte()
    draw_detections(list(images), [found((0, 0.9, 20, 20, 90, 90))] * 12, NAMES, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 1_000_000


def test_class_colors_are_distinct_bright_and_legible():
    colors = [class_color(label) for label in range(91)]
    assert colors == [class_color(label) for label in range(91)]
    apart = [np.abs(np.subtract(a, b)).max() for a, b in itertools.combinations(colors, 2)]
    assert min(apart) > 0.02
    well_known = [np.abs(np.subtract(a, b)).max() for a, b in itertools.combinations(colors[:7], 2)]
    assert min(well_known) > 0.2
    for color in colors:
        light = luminance(color)
        assert (light + 0.05) / 0.05 >= 3  # contrast with the dark line around the box (WCAG)
        text = 0.0 if light > 0.18 else 1.0
        assert (max(light, text) + 0.05) / (min(light, text) + 0.05) >= 4.5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": []}, ValueError, "nothing to draw: 0 images"),
        ({"columns": 0}, ValueError, "1 images in 0 columns"),
        ({"images": [grey().float()]}, TypeError, r"images\[0\] must be uint8.*float32"),
        ({"images": [grey()[0]]}, ValueError, r"images\[0\] must be \(3, H, W\).*\(128, 128\)"),
        ({"detections": []}, ValueError, "1 images, but detections of 0"),
        ({"targets": [annotated()] * 2}, ValueError, "1 images, but targets of 2"),
        ({"detections": [annotated()]}, ValueError, r"detections\[0\] lacks \['scores'\]"),
        (
            {"detections": [found((0, 1, 0, 0, 9, 9)) | {"labels": torch.zeros(2)}]},
            ValueError,
            r"detections\[0\] must have N boxes.*'labels': \(2,\)",
        ),
        (
            {"targets": [{"labels": torch.zeros(0), "boxes": torch.zeros(0)}]},
            ValueError,
            r"targets\[0\] must have N boxes",
        ),
        (
            {"targets": [annotated((0, 0.5, 0.5, 0.2, 0.2))]},
            ValueError,
            r"targets\[0\]\['boxes'\] lie in \[0, 1\]",
        ),
    ],
)
def test_wrong_arguments_are_named(tmp_path, change, error, message):
    arguments = {"images": [grey()], "detections": [found()]} | change
    with pytest.raises(error, match=message):
        draw_detections(class_names=NAMES, output_png=tmp_path / "grid.png", **arguments)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_detections([grey()], [found()], NAMES, path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["grid.png"]


def test_import_needs_no_matplotlib(monkeypatch):
    monkeypatch.setattr(detr_fast, "visualize", detr_fast.visualize)  # comes back after the test
    for name in [name for name in sys.modules if name.split(".")[:2] == ["detr_fast", "visualize"]]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] in ("matplotlib", "PIL")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert importlib.import_module("detr_fast.visualize").draw_detections is not draw_detections
