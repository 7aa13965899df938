# SPDX-License-Identifier: Apache-2.0
"""Dirty data and mistakes, by message and exit code: what a stranger's first hour is made of."""

import copy
import json
import pickle
import re

import pytest
import torch

from detr_fast import cli
from detr_fast.engine import train
from tests.data.layout_writers import DATA, coco_json, write_images

MODEL = (
    "--model detr_tiny --hidden_dim 32 --nheads 4 --dim_feedforward 32 --num_queries 8 "
    "--backbone_weights none --image_size 64 --epochs 1 --batch_size 1 --num_workers 0 "
    "--device cpu "
)
PARTS = ("train_images", "train_annotations", "val_images", "val_annotations")


class Data:
    """A small data set on disk, for a test to spoil."""

    def __init__(self, root):
        self.root = root
        self.content = {split: coco_json(pictures) for split, pictures in DATA.items()}
        for split, pictures in DATA.items():
            write_images(root / split, pictures)

    def flags(self):
        for split, content in self.content.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (self.root / f"{split}.json").write_text(text)
        files = [self.root / split.replace("_annotations", ".json") for split in PARTS]
        files = [path.with_name(path.name.replace("_images", "")) for path in files]
        return " ".join(f"--{part} {path}" for part, path in zip(PARTS, files, strict=True))


@pytest.fixture
def data(tmp_path):
    return Data(tmp_path)


@pytest.fixture
def run(data, capfd):
    """Train on the data; return the exit code, what was printed, and the lines of errors."""

    def run(flags=""):
        code = cli.train(f"{MODEL} {data.flags()} {flags}".split())
        printed = capfd.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in printed.err
        assert len(errors) == (code in (1, 2))
        return code, printed.out + printed.err

    return run


def first(data, split="train"):
    return data.content[split]["annotations"][0]


def repeat_id(data):
    data.content["train"]["annotations"][1]["id"] = 1


def repeat_image(data):
    data.content["train"]["images"][1]["id"] = 1


def leave_folder(data):
    (data.root / "secret.png").write_bytes((data.root / "train/a.png").read_bytes())
    data.content["train"]["images"][0]["file_name"] = "../secret.png"


def truncate(data, name="train/c 1.x.jpg"):
    path = data.root / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def category_0(data):
    for content in data.content.values():
        content["categories"][0]["id"] = 0
        for entry in content["annotations"]:
            entry["category_id"] -= entry["category_id"] == 1


# what is spoilt, what is said, and whether the run goes on without it (exit code 0)
TABLE = {
    "box of no width": (
        lambda d: first(d).update(bbox=[1, 2, 0, 5]),
        "1 boxes whose width or height is not above 0 (left out): annotation 1 (image 1, a.png)",
    ),
    "box of negative height": (
        lambda d: first(d).update(bbox=[1, 2, 3, -5]),
        "1 boxes whose width or height is not above 0 (left out): annotation 1 (image 1, a.png)",
    ),
    "NaN in a box": (
        lambda d: first(d).update(bbox=[1, 2, float("nan"), 5]),
        "without 4 finite numbers as 'bbox' (left out): annotation 1 (image 1, a.png)",
    ),
    "box outside": (
        lambda d: first(d).update(bbox=[50, 2, 3, 5]),
        "1 boxes outside of their image (left out): annotation 1 (image 1, a.png)",
    ),
    "category that the file does not list": (
        lambda d: first(d).update(category_id=99),
        "1 annotations of categories that are not listed (left out): annotation 1 (image 1, a.png)",
    ),
    "annotation of no image": (
        lambda d: first(d).update(image_id=99),
        "1 annotations of images that are not listed (left out): annotation 1 (image 99)",
    ),
    "repeated annotation id": (
        repeat_id,
        "1 annotations with the id of another one (kept): annotation 1 (image 1, a.png)",
    ),
    "repeated image id": (
        repeat_image,
        "2 images of one id that name different files (left out): image 1 (a.png), image 1 (b.jpg)",
    ),
    "image outside the folder": (
        leave_folder,
        "1 images whose 'file_name' leaves the image folder (left out): image 1 (../secret.png)",
    ),
    "missing image": (
        lambda d: (d.root / "train/a.png").unlink(),
        "train.json: 1 images whose file is missing (left out): image 1 (a.png)",
    ),
    "truncated image": (
        truncate,
        "1 images that cannot be decoded (replaced by the next one): image 3 (c 1.x.jpg)",
    ),
    "truncated image to be evaluated": (
        lambda d: truncate(d, "val/v1.jpg"),
        "1 images that cannot be decoded (left out): image 1 (v1.jpg)",
    ),
    "size mismatch": (
        lambda d: d.content["train"]["images"][0].update(width=80, height=60),
        "image 1 (a.png) has 40 x 30 pixels, not 80 x 60; it is replaced by the next one",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_dirty_data_are_left_out_and_said(name, data, run):
    spoil, message = TABLE[name]
    spoil(data)
    code, printed = run()
    assert code == 0, printed
    assert message in printed
    for flags, end in (("--strict_data", ": mend them"), ("--check_data", "; training leaves")):
        code, printed = run(flags)
        assert code == 2
        assert re.search(rf"error: \d problems in the data, said above{end}|restore the", printed)


def empty(data):
    for content in data.content.values():
        content["annotations"].clear()


FATAL = {
    "empty annotation file": (lambda d: d.content.update(train=""), "train.json: "),
    "truncated annotation file": (
        lambda d: d.content.update(train=json.dumps(d.content["train"])[:-40]),
        "is the copy complete",
    ),
    "no list of images": (lambda d: d.content.update(train="{}"), "no list 'images'"),
    "data without any box": (empty, "no box to learn or to score in 3 images"),
    "all boxes wrong": (
        lambda d: [a.update(bbox=[0, 0, 0, 0]) for a in d.content["train"]["annotations"]],
        "no box to learn or to score in 3 images",
    ),
    "no class": (lambda d: d.content["train"]["categories"].clear(), "'categories'"),
    "no image left": (
        lambda d: [p.unlink() for p in (d.root / "train").iterdir()],
        "none of the 3 images of",
    ),
    "no image readable": (
        lambda d: [p.write_bytes(b"") for p in (d.root / "train").iterdir()],
        "can be used",
    ),
}


@pytest.mark.parametrize("name", FATAL)
def test_useless_data_end_with_one_line(name, data, run):
    spoil, message = FATAL[name]
    spoil(data)
    code, printed = run()
    assert code == 2
    assert message in printed


def test_clean_data_say_nothing_is_wrong(data, run):
    for flags in ("--check_data", "--check_data --strict_data", "--strict_data"):
        code, printed = run(flags)
        assert code == 0
        assert "warning" not in printed
        assert ("nothing wrong found" in printed) == ("--check_data" in flags)


def test_category_id_0_is_a_class_like_any_other(data, run, tmp_path):
    category_0(data)
    code, printed = run(f"--strict_data --output_dir {tmp_path}/out")
    assert code == 0
    assert "train: 3 images, 14 boxes of 3 classes: cup 12" in printed
    checkpoint = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)
    assert checkpoint["class_names"] == {0: "apple", 1: "bear", 2: "cup"}
    assert checkpoint["category_ids"] == {0: 0, 1: 2, 2: 3}


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_hostile_and_truncated_checkpoints_are_refused(data, run, tmp_path):
    hostile, whole = tmp_path / "hostile.pth", tmp_path / "out/checkpoint.pth"
    hostile.write_bytes(pickle.dumps({"model": Hostile(tmp_path / "ran")}))
    for flag in ("--resume", "--finetune"):
        code, printed = run(f"{flag} {hostile}")
        assert code == 2
        assert "refused, nothing of it was run" in printed
    assert not (tmp_path / "ran").exists()
    assert run(f"--output_dir {tmp_path}/out")[0] == 0
    whole.write_bytes(whole.read_bytes()[:-1000])
    code, printed = run(f"--resume {whole}")
    assert code == 2
    assert "damaged" in printed
    code, printed = run("--finetune /nowhere.pth")
    assert code == 2
    assert "/nowhere.pth: no such file" in printed


def test_classes_come_from_the_data_and_come_back(data, run, tmp_path, capfd):
    """Arbitrary ids; the file to evaluate lists the same classes under other ids."""
    for content in data.content.values():
        for entry in (*content["categories"], *content["annotations"]):
            key = "category_id" if "category_id" in entry else "id"
            entry[key] = {1: 1000, 2: 7, 3: 2_000_000}[entry[key]]
    code, printed = run(f"--output_dir {tmp_path}/out --ema_decay 0.5")
    assert code == 0
    checkpoint = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)
    assert checkpoint["class_names"] == {0: "bear", 1: "apple", 2: "cup"}
    assert checkpoint["category_ids"] == {0: 7, 1: 1000, 2: 2_000_000}
    assert checkpoint["model_config"]["num_classes"] == 3
    table = printed.partition("IoU metric")[2].splitlines()[:13]

    other = copy.deepcopy(data.content["val"])
    ids = {7: 0, 1000: 1, 2_000_000: 2}
    for entry in (*other["categories"], *other["annotations"]):
        key = "category_id" if "category_id" in entry else "id"
        entry[key] = ids[entry[key]]
    (tmp_path / "other.json").write_text(json.dumps(other))
    capfd.readouterr()
    arguments = f"--resume {tmp_path}/out/checkpoint.pth --device cpu --save_json "
    arguments += f"--val_images {tmp_path}/val --val_annotations {tmp_path}/other.json "
    assert cli.evaluate(f"{arguments} --output_dir {tmp_path}/eval".split()) == 0
    assert capfd.readouterr().out.partition("IoU metric")[2].splitlines()[:13] == table
    found = json.loads((tmp_path / "eval/detections.json").read_text())
    assert {entry["category_id"] for entry in found} <= {0, 1, 2}

    # without data flags, those of the training are evaluated, and their ids are written
    arguments = f"--resume {tmp_path}/out/checkpoint.pth --device cpu --save_json "
    assert cli.evaluate(f"{arguments} --output_dir {tmp_path}/eval".split()) == 0
    found = json.loads((tmp_path / "eval/detections.json").read_text())
    assert {entry["category_id"] for entry in found} <= {7, 1000, 2_000_000}

    other["categories"][0]["name"] = "unheard of"
    (tmp_path / "other.json").write_text(json.dumps(other))
    arguments = f"--resume {tmp_path}/out/checkpoint.pth --device cpu "
    arguments += f"--val_images {tmp_path}/val --val_annotations {tmp_path}/other.json"
    assert cli.evaluate(arguments.split()) == 2
    assert "knows bear, apple, cup; the data have unheard of" in capfd.readouterr().err


def test_debug_shows_the_traceback(capsys):
    assert cli.train(["--coco_path", "/nowhere", "--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.splitlines()[-1].startswith("error: /nowhere")


def test_a_full_disk_ends_with_one_line(data, run, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", "checkpoint.pth")

    monkeypatch.setattr(train.OutputFolder, "write_checkpoint", full)
    code, printed = run(f"--output_dir {data.root}/out")
    assert code == 2
    assert "error: [Errno 28] No space left on device: 'checkpoint.pth'" in printed
