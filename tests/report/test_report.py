# SPDX-License-Identifier: Apache-2.0
"""The report: what is on the page, in the file and in a browser."""

import json
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast import cli
from detr_fast.evaluation import find_errors
from detr_fast.report.page import Run, Scored, page
from tests.evaluation.scenes import result, truth
from tests.predict.conftest import checkpoint  # noqa: F401
from tests.report.browser import look


def scored(tmp_path, found=None):
    outcome = result() if found is None else result(found)
    errors = find_errors(truth(), outcome)
    picture = tmp_path / "picture.jpg"
    Image.new("RGB", (40, 30), (200, 0, 0)).save(picture)
    pictures = [picture.read_bytes()] * len(errors.images)
    return Scored(tmp_path / "best.pth", 4, outcome, truth(), errors, pictures)


def records(count=3):
    return [
        {"epoch": e, "train_loss": 3.0 - e, "test_coco_eval_bbox": [0.1 * e] * 12, "train_lr": 1e-4}
        for e in range(count)
    ]


@pytest.fixture
def runs(tmp_path):
    return [
        Run("first", records(), scored(tmp_path)),
        Run("<i>second</i>", [], scored(tmp_path, {1: [], 2: [], 3: []})),
        Run("third", records(2), None),
    ]


def cells(html, heading):
    """The texts of the table below a heading, by row."""
    table = re.search(rf">{heading}</h[23]>.*?<tbody>(.*?)</tbody>", html, re.DOTALL).group(1)
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [[unescape(c) for c in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]


def test_the_page_has_the_numbers(runs):
    html = page(runs, 0.5)
    stats = runs[0].scored.result.stats
    first, second = cells(html, "Summary")
    assert first[:5] == ["first", "best.pth", "4", "3", "4"]
    assert first[5:] == [
        "\N{EN DASH}" if stats[i] < 0 else f"{stats[i]:.3f}" for i in (0, 1, 2, 3, 4, 5, 8)
    ]
    assert second[5] == "0.000"
    assert f'<td class="best">{stats[0]:.3f}</td>' in html
    cat, dog, bird = cells(html[html.index('id="run-1"') :], "Classes")
    assert cat[:2] == ["cat", "2"]
    assert dog[:3] == ["dog", "2", f"{runs[0].scored.result.per_class()['dog']['AP']:.3f}"]
    assert dog[4:] == ["0.600", "1.000", "1.000", "1.000"]
    assert bird == ["<b>bird</b>", "0"] + ["\N{EN DASH}"] * 6
    assert ["dog", "cat", "1"] in cells(html, "Confused classes")
    assert "image 2 (2.png):\n0 right, 1 false, 1 missed" in html
    doubts = cells(html, "Annotations to look at")
    assert ["2", "2.png", "<b>bird</b>", "0.550", "nothing"] in doubts
    assert "Without a log: &lt;i&gt;second&lt;/i&gt;." in html


def test_names_from_annotations_are_no_markup(runs):
    html = page(runs, 0.5)
    assert "<b>" not in html
    assert "<i>" not in html


def test_nothing_is_loaded_from_elsewhere(runs):
    html = page(runs, 0.5)
    sources = re.findall(r'(?:src|href)="([^"]{1,12})', html)
    assert {source.split(":")[0].split("-")[0] for source in sources if source[0] != "#"} == {
        "data"
    }
    assert "default-src 'none'" in html


def test_runs_scored_on_other_data_are_told_apart(tmp_path, runs):
    warning = "do not compare"
    assert warning not in page(runs, 0.5)
    moved = scored(tmp_path)
    boxes = moved.truth.boxes.copy()
    boxes[0, 0] += 1
    moved = moved._replace(truth=replace(moved.truth, boxes=boxes))
    for other in (scored(tmp_path, {1: []}), moved):
        html = page([runs[0], Run("other", [], other)], 0.5)
        assert warning in html
        assert 'class="best"' not in html


def test_only_a_log_is_a_page_too(runs):
    html = page(runs[2:], 0.5)
    assert "Training" in html
    assert "Summary" not in html


def test_a_browser_shows_it_without_a_complaint(tmp_path, runs):
    (path := tmp_path / "report.html").write_text(page(runs, 0.5), encoding="utf-8")
    seen = look(path)
    assert seen.console == []
    assert "The worst images" in seen.dom
    assert look(path, tmp_path / "shot.png").console == []
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    assert pixels.shape == (4000, 1280, 3)
    red = (np.abs(pixels.astype(int) - (200, 0, 0)) < 12).all(-1).sum()
    assert red > 2 * 300 * 200  # the pictures of the worst images are there, and large
    assert (pixels[:2000] < 100).any(-1).mean() > 0.01  # text and curves


def test_a_complaint_would_be_seen(tmp_path, runs):
    html = page(runs, 0.5).replace('"use strict";', '"use strict"; nothing.here();')
    (path := tmp_path / "broken.html").write_text(html, encoding="utf-8")
    assert "nothing is not defined" in " ".join(look(path).console)
    html = page(runs, 0.5).replace("<main>", '<main><img src="https://example.org/a.png" alt="">')
    (path := tmp_path / "remote.html").write_text(html, encoding="utf-8")
    assert "Content Security Policy" in " ".join(look(path).console)


def test_a_click_on_a_heading_sorts(tmp_path, runs):
    click = """<script>
      const table = document.querySelector("#run-1 table.sortable");
      table.tHead.rows[0].cells[%d].querySelector("button").click();%s
    </script></body>"""
    again = " table.tHead.rows[0].cells[%d].querySelector('button').click();"
    for column, times, wanted in (
        (3, 1, ["dog", "cat", "<b>bird</b>"]),
        (3, 2, ["<b>bird</b>", "cat", "dog"]),
        (0, 2, ["<b>bird</b>", "cat", "dog"]),
    ):
        code = click % (column, again % column if times == 2 else "")
        html = page(runs, 0.5).replace("</body>", code)
        (path := tmp_path / "clicked.html").write_text(html, encoding="utf-8")
        seen = look(path)
        assert seen.console == []
        rows = cells(seen.dom[seen.dom.index('id="run-1"') :], "Classes")
        assert [row[0] for row in rows] == wanted, (column, times)


def folder_of(tmp_path, name, checkpoint):  # noqa: F811
    folder = tmp_path / name
    folder.mkdir()
    (folder / "checkpoint.pth").write_bytes(checkpoint.read_bytes())
    (folder / "log.txt").write_text("".join(json.dumps(r) + "\n" for r in records()))
    return folder


@pytest.fixture
def data(tmp_path):
    """Images of three sizes with the classes of the checkpoint, one image without a box."""
    folder = tmp_path / "images"
    folder.mkdir()
    torch.manual_seed(0)
    images, annotations = [], []
    for number, (width, height) in enumerate(((90, 60), (60, 90), (64, 64)), start=1):
        pixels = torch.randint(0, 255, (height, width, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append(
            {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
        )
        if number < 3:
            box = {"bbox": [5, 5, 30, 30], "area": 900, "iscrowd": 0, "category_id": 8}
            annotations.append({"id": number, "image_id": number, **box})
    categories = [
        {"id": i, "name": n}
        for i, n in ((7, "disc"), (8, "rectangle"), (9, "triangle"), (11, "cross"))
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "val.json").write_text(json.dumps(content))
    return f"--val_images {folder} --val_annotations {tmp_path / 'val.json'} --device cpu"


def test_the_command_evaluates_and_writes(tmp_path, checkpoint, data, capsys):  # noqa: F811
    one, two = (folder_of(tmp_path, name, checkpoint) for name in ("one", "two"))
    line = f"--runs {one} {two / 'checkpoint.pth'} {data} --threshold 0.1 --worst 2"
    assert cli.report(line.split()) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.splitlines()[-1] == f"{one / 'report.html'}: one, two/checkpoint"
    html = (one / "report.html").read_text(encoding="utf-8")
    first, second = cells(html, "Summary")
    assert first[3:5] == ["3", "2"]
    assert first[3:] == second[3:]
    assert html.count('loading="lazy"') == 4
    assert "3.png" in html  # has no box, and this model finds something everywhere
    assert not (two / "report.html").exists()
    assert cli.report([*line.split(), "--output_dir", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "report.html").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "--runs: name one: outputs/shapes"),
        ("--runs nowhere", "--runs: nowhere: no such folder or checkpoint"),
        ("--runs {empty} {empty}/../empty", "is named twice"),
        ("--runs {empty}", "neither a checkpoint nor a log.txt with an epoch"),
        ("--runs {other}", "its log.txt is that of something else"),
        ("--runs {empty} --threshold 2", "--threshold 2: expected 0 to 1"),
        ("--runs {empty} --worst -1", "--worst -1: expected at least 0"),
        ("--runs {empty} --resume x.pth", "--resume: leave it out of a report"),
    ],
)
def test_mistakes_are_told(tmp_path, capsys, line, message):
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "log.txt").write_text("step 1\nstep 2\n")
    names = {name: tmp_path / name for name in ("empty", "other")}
    assert cli.report(line.format(**names).split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("*/report.html"))
