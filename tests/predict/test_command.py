# SPDX-License-Identifier: Apache-2.0
"""The command line: what it writes, and how mistakes end."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast import cli
from detr_fast.predict.detections import Detections
from detr_fast.predict.detector import Prediction
from detr_fast.predict.sources import Source
from detr_fast.predict.writers import Pictures, boxes_on, glowing


def predict(capsys, line, code=0):
    assert cli.predict([str(word) for word in line]) == code
    return capsys.readouterr()


def test_a_folder_is_predicted(capsys, tmp_path, checkpoint, dirty_folder):
    out = tmp_path / "out"
    line = ["--checkpoint", checkpoint, "--input", dirty_folder, "--output_dir", out]
    printed = predict(capsys, [*line, "--threshold", "0", "--batch_size", 3]).out
    assert "corrupt.jpg cannot be decoded" in printed
    assert "objects in 6 images" in printed
    assert "; 1 left out" in printed
    pictures = sorted(str(p.relative_to(out / "pictures")) for p in (out / "pictures").rglob("*.*"))
    expected = ["below/grey", "cmyk", "pixel", "plain", "sixteen", "turned"]
    assert pictures == [f"{name}.jpg" for name in expected]
    with Image.open(out / "pictures" / "turned.jpg") as picture:
        assert picture.size == (6 * 90, 6 * 60)  # so that names can be read
    rows = list(csv.DictReader((out / "detections.csv").open()))
    results = json.loads((out / "detections.json").read_text())
    assert len(rows) == len(results) > 6
    assert {entry["category_id"] for entry in results} <= {7, 8, 9, 11}
    assert len({entry["image_id"] for entry in results}) == 6
    best = max(results, key=lambda entry: entry["score"])
    [row] = [r for r in rows if float(r["score"]) == pytest.approx(best["score"], abs=1e-4)][:1]
    assert float(row["x0"]) == pytest.approx(best["bbox"][0], abs=0.01)


def test_results_are_those_of_the_evaluation(capsys, tmp_path, checkpoint, scene):
    """With the image ids of the annotations; for one image a batch, so that none is padded."""
    (folder := tmp_path / "images").mkdir()
    entries, boxes = [], []
    for number, image in enumerate((scene, scene[::-1], 255 - scene[:50])):
        Image.fromarray(image).save(folder / f"p{number}.png")
        size = {"height": len(image), "width": 90}
        entries.append({"id": 40 + number, "file_name": f"p{number}.png"} | size)
        box = {"bbox": [10, 5, 40, 20], "area": 800, "iscrowd": 0}
        boxes.append({"id": number, "image_id": 40 + number, "category_id": 8} | box)
    names = ["disc", "rectangle", "triangle", "cross"]
    categories = [{"id": i, "name": n} for i, n in zip((7, 8, 9, 11), names, strict=True)]
    content = {"images": entries, "annotations": boxes, "categories": categories}
    (truth := tmp_path / "truth.json").write_text(json.dumps(content))
    line = f"--resume {checkpoint} --val_images {folder} --val_annotations {truth} --save_json"
    line += f" --batch_size 1 --num_workers 0 --output_dir {tmp_path}"
    assert cli.evaluate(line.split()) == 0
    expected = json.loads((tmp_path / "detections.json").read_text())
    out = tmp_path / "out"
    line = ["--checkpoint", checkpoint, "--input", folder, "--output_dir", out, "--threshold", 0]
    predict(capsys, [*line, "--image_ids", truth, "--save", "json"])
    assert [path.name for path in out.iterdir()] == ["detections.json"]
    found = json.loads((out / "detections.json").read_text())

    def rows(results):
        keys = [(r["image_id"], r["category_id"], r["score"], *r["bbox"]) for r in results]
        return np.array(sorted(keys))

    assert len(expected) == len(found) == 3 * 16
    np.testing.assert_allclose(rows(found), rows(expected), rtol=1e-4, atol=1e-3)


def test_attention_is_drawn(capsys, tmp_path, checkpoint, scene):
    Image.fromarray(scene).save(tmp_path / "a.png")
    line = ["--checkpoint", checkpoint, "--input", tmp_path / "a.png", "--output_dir", tmp_path]
    predict(capsys, [*line, "--threshold", 0, "--attention", "--format", "png"])
    assert len(list((tmp_path / "pictures").glob("a_attention*.png"))) == 16


def test_generated_images_and_a_limit(capsys, tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predict(capsys, ["--checkpoint", checkpoint, "--input", "shapes", "--limit", 2])
    pictures = tmp_path / "outputs" / "predict" / "pictures"
    assert sorted(path.name for path in pictures.iterdir()) == ["000000.jpg", "000001.jpg"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--input shapes", "--checkpoint: name one: outputs/shapes/checkpoint.pth"),
        ("--checkpoint C", "the following arguments are required: --input"),
        ("--checkpoint /nowhere.pth --input shapes", "/nowhere.pth: no such file"),
        ("--checkpoint C --input /nowhere", "/nowhere: no such file or folder"),
        ("--checkpoint C --input shapes --threshold 7", "threshold 7.0: a score lies in"),
        ("--checkpoint C --input shapes --limit -1", "--limit -1: expected at least 0"),
        ("--checkpoint C --input shapes --device cuda:77", "--device cuda:77"),
        ("--checkpoint C --input shapes --image_ids C", "no valid JSON"),
    ],
)
def test_mistakes_end_with_one_line(capsys, tmp_path, checkpoint, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    words = [str(checkpoint) if word == "C" else word for word in line.split()]
    told = predict(capsys, words, code=2).err
    assert message in told
    assert len(told.splitlines()) == 1


def test_only_unusable_images(capsys, tmp_path, checkpoint):
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    line = ["--checkpoint", checkpoint, "--input", tmp_path, "--output_dir", tmp_path / "out"]
    assert "none of the 1 images can be used" in predict(capsys, line, code=2).err


def found_in(image, box=(10, 5, 50, 25)):
    data = {"class_name": np.array(["disc"])}
    fields = np.array([box], np.float32), np.array([0.9], np.float32), np.array([0])
    return Detections(*fields, data, image.shape[1:])


def test_a_box_is_drawn_where_it_is(scene):
    image = torch.from_numpy(scene).permute(2, 0, 1).contiguous()
    drawn = boxes_on(image, found_in(image))
    changed = (drawn != image).any(0)
    assert changed[25, 11:50].all()
    assert changed[6:25, 10].all()
    assert not changed[30:].any()
    beyond = found_in(image, (-5, -5, 200, 200))
    assert boxes_on(image, beyond).shape == image.shape


def test_attention_glows_where_it_is(scene):
    image = torch.from_numpy(scene).permute(2, 0, 1)
    weights = np.zeros((2, 3), np.float32)
    weights[1, 2] = 0.4
    drawn = glowing(image, weights).float()
    redness = drawn[0] - drawn[2]
    assert redness[-5:, -5:].mean() > 100
    assert redness[:20, :20].abs().max() < 1


def test_pictures_of_one_name_both_stay(tmp_path, scene):
    image = torch.from_numpy(scene).permute(2, 0, 1)
    pictures = Pictures(tmp_path, "png")
    for name in ("a", "A", "a"):
        pictures.write(Prediction(Source(name, name, lambda: image), image, found_in(image)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A_2.png", "a.png", "a_3.png"]
