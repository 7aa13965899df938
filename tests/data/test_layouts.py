# SPDX-License-Identifier: Apache-2.0
import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch

from detr_fast.data.annotations import CocoAnnotations, DatasetError
from detr_fast.data.coco import CocoDetection
from detr_fast.data.layouts import find_layout
from detr_fast.data.validate import DataReport
from tests.data import layout_writers as writers

FORMS = {
    "COCO": writers.write_coco,
    "Roboflow COCO": writers.write_roboflow,
    "YOLO": writers.write_yolo,
    "YOLO by split": lambda root: writers.write_yolo(root, folders="{split}/{what}"),
    "Pascal VOC": writers.write_voc,
    "Pascal VOC from 0": lambda root: writers.write_voc(root, first=0),
    "Pascal VOC side by side": writers.write_voc_side_by_side,
}


def contents(layout):
    """Splits as they are read, from readers that leave nothing out."""
    found = {}
    for split in ("train", "val"):
        report = DataReport(split)
        found[split] = layout.source(split).read(report)
        assert not report.lines()
    return found


def by_name(content):
    """File name, size and objects of each image: the class by its name, the box, the area."""
    classes = {entry["id"]: entry["name"] for entry in content["categories"]}
    objects = {entry["id"]: [] for entry in content["images"]}
    for thing in content["annotations"]:
        assert thing["iscrowd"] == 0
        numbers = pytest.approx((*thing["bbox"], thing["area"]), abs=1e-9, rel=0)
        objects[thing["image_id"]].append((classes[thing["category_id"]], numbers))
    keys = ("file_name", "width", "height")
    return [[entry[key] for key in keys] + objects[entry["id"]] for entry in content["images"]]


def as_written(pictures):
    def plain(name, box):
        return name, (*box, box[2] * box[3])

    return [[p.name, p.width, p.height] + [plain(*thing) for thing in p.objects] for p in pictures]


@pytest.mark.parametrize("form", FORMS)
def test_every_layout_gives_what_was_written(tmp_path, form):
    layout = find_layout(FORMS[form](tmp_path / "data"))
    assert form.startswith(layout.name)
    assert layout.missing == {}
    for split, content in contents(layout).items():
        assert by_name(content) == as_written(writers.DATA[split])
        assert [entry["id"] for entry in content["images"]] == list(
            range(1, len(writers.DATA[split]) + 1)
        )
        count = sum(len(picture.objects) for picture in writers.DATA[split])
        assert [thing["id"] for thing in content["annotations"]] == list(range(1, count + 1))
        source = layout.source(split)
        assert all((source.images / entry["file_name"]).is_file() for entry in content["images"])
        assert source.annotations.exists()
        names = [entry["name"] for entry in content["categories"] if entry["name"] != "things"]
        assert names == writers.NAMES
        assert json.loads(json.dumps(content)) == content  # plain numbers and strings


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("COCO", "data: COCO (annotations/instances_*2017.json), boxes in pixels"),
        (
            "Roboflow COCO",
            "data: Roboflow COCO (train, valid, each with _annotations.coco.json), boxes in pixels",
        ),
        ("YOLO", "data: YOLO (data.yaml), 3 classes, boxes as shares of the image"),
        (
            "Pascal VOC",
            "data: Pascal VOC (train: train.txt, val: val.txt), classes by name, "
            "difficult objects kept",
        ),
        (
            "Pascal VOC side by side",
            "data: Pascal VOC (train: train, val: valid), classes by name, difficult objects kept",
        ),
    ],
)
def test_what_was_recognised_is_said(tmp_path, form, said):
    assert find_layout(FORMS[form](tmp_path / "data")).said == said


def test_sources_travel_to_other_processes(tmp_path):
    for at, write in enumerate(FORMS.values()):
        layout = find_layout(write(tmp_path / str(at)))
        assert contents(pickle.loads(pickle.dumps(layout))) == contents(layout)


def test_the_first_of_two_layouts_decides(tmp_path):
    writers.write_voc(tmp_path)
    assert find_layout(tmp_path).name == "Pascal VOC"
    writers.write_yolo(tmp_path)
    assert find_layout(tmp_path).name == "YOLO"
    writers.write_roboflow(tmp_path)
    assert find_layout(tmp_path).name == "Roboflow COCO"
    writers.write_coco(tmp_path)
    assert find_layout(tmp_path).name == "COCO"


def test_part_of_an_official_layout_does_not_hide_another(tmp_path):
    writers.write_yolo(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val2017.json").write_text("{}")
    assert find_layout(tmp_path).name == "YOLO"


@pytest.mark.parametrize("year", ["2014", ""])
@pytest.mark.parametrize("parent", ["", "images/"])
def test_other_years_and_image_folders_of_coco(tmp_path, year, parent):
    writers.write_coco(tmp_path)
    for split in ("train", "val"):
        folder = tmp_path / f"{parent}{split}{year}"
        folder.parent.mkdir(exist_ok=True)
        (tmp_path / f"{split}2017").rename(folder)
        file = tmp_path / "annotations" / f"instances_{split}2017.json"
        file.rename(file.with_name(f"instances_{split}{year}.json"))
    layout = find_layout(tmp_path)
    assert layout.name == "COCO"
    assert layout.source("val").images == tmp_path / f"{parent}val{year}"
    assert by_name(contents(layout)["val"]) == as_written(writers.DATA["val"])


def test_the_complete_year_is_taken(tmp_path):
    writers.write_coco(tmp_path)
    for split in ("train", "val"):
        (tmp_path / f"{split}2014").mkdir()
        shutil.copy(
            tmp_path / f"annotations/instances_{split}2017.json",
            tmp_path / f"annotations/instances_{split}2014.json",
        )
    assert find_layout(tmp_path).source("train").images.name == "train2017"
    shutil.rmtree(tmp_path / "train2017")  # else train and val would be of two years
    layout = find_layout(tmp_path)
    assert {source.images.name for source in layout.sources.values()} == {"train2014", "val2014"}


@pytest.mark.parametrize("missing", ["train2017", "annotations/instances_train2017.json"])
@pytest.mark.parametrize("alone", [True, False])
def test_missing_part_of_the_official_layout_is_named(tmp_path, missing, alone):
    writers.write_coco(tmp_path)
    if alone:  # nothing of the other split either
        shutil.rmtree(tmp_path / "val2017")
        (tmp_path / "annotations/instances_val2017.json").unlink()
    path = tmp_path / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    layout = find_layout(tmp_path)
    assert set(layout.sources) == (set() if alone else {"val"})
    message = (
        f"{path} does not exist: --coco_path must hold train2017/, val2017/ and "
        "annotations/instances_{train,val}2017.json"
    )
    with pytest.raises(DatasetError, match=re.escape(message)):
        layout.source("train")
    if alone:
        with pytest.raises(DatasetError, match=r"val2017 and .*_val2017\.json do not exist"):
            layout.source("val")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("Roboflow COCO", r"val/_annotations\.coco\.json does not exist"),
        ("YOLO", r"images/val \(named by .*data\.yaml\) does not exist"),
        ("Pascal VOC", r"Main/val\.txt does not exist"),
        ("Pascal VOC side by side", r"val does not exist or holds no XML files"),
    ],
)
def test_missing_split_is_named_when_it_is_asked_for(tmp_path, form, message):
    root = FORMS[form](tmp_path / "data")
    for part in ("valid", "images/val"):
        shutil.rmtree(root / part, ignore_errors=True)
    (root / "ImageSets/Main/val.txt").unlink(missing_ok=True)
    layout = find_layout(root)
    assert by_name(layout.source("train").read(DataReport(""))) == as_written(writers.DATA["train"])
    with pytest.raises(DatasetError, match=message):
        layout.source("val")


def test_nothing_recognised_says_what_was_looked_for(tmp_path):
    with pytest.raises(DatasetError, match=r"no data set recognised; .*the folder is empty; name"):
        find_layout(tmp_path)
    for number in range(9):
        (tmp_path / f"part{number}").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "boxes.csv").touch()
    with pytest.raises(DatasetError) as caught:
        find_layout(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: no data set recognised; looked for annotations/inst")
    for part in ("train/_annotations.coco.json", "data.yaml", "labels/train/", "ImageSets/Main/"):
        assert part in message
    assert (
        "the folder holds boxes.csv, part0/, part1/, part2/, part3/, part4/, part5/, part6/, "
        in (message)
    )
    assert "part7" not in message
    flags = re.findall(r"--\w+", message)
    assert flags == ["--train_images", "--train_annotations", "--val_images", "--val_annotations"]
    assert "\n" not in message


def test_folders_that_several_layouts_may_have_tell_nothing(tmp_path):
    for name in ("train", "val", "images/train", "Annotations"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"no data set recognised.*holds Annotations/, images/"):
        find_layout(tmp_path)


def test_a_path_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere does not exist: .*--train_images"):
        find_layout(tmp_path / "nowhere")
    (tmp_path / "boxes.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"boxes\.json: neither a folder nor a YOLO yaml"):
        find_layout(tmp_path / "boxes.json")


def as_read(image, target):
    return torch.from_numpy(np.array(image)), target


def dataset_of(root, split):
    """A split by the whole chain of readers, and what they report."""
    source = find_layout(root).source(split)
    report = DataReport(str(source.annotations))
    content = source.read(report)
    annotations = CocoAnnotations.from_dict(content, str(source.annotations), report)
    return CocoDetection(source.images, annotations, as_read, report=report), report


def assert_identical_targets(root, reference, split, count):
    (dataset, report), (wanted, wanted_report) = (
        dataset_of(root, split),
        dataset_of(reference, split),
    )
    assert report.counts == wanted_report.counts
    assert dataset.class_names == wanted.class_names
    assert len(dataset) == len(wanted) == count
    for (image, target), (wanted_image, wanted_target) in zip(dataset, wanted, strict=True):
        assert torch.equal(image, wanted_image)
        assert target.keys() == wanted_target.keys()
        for key in target.keys() - {"image_id"}:
            assert target[key].dtype == wanted_target[key].dtype
            assert torch.equal(target[key], wanted_target[key]), key


@pytest.mark.parametrize("form", [form for form in FORMS if form != "COCO"])
def test_every_layout_gives_identical_targets(tmp_path, form):
    root, reference = FORMS[form](tmp_path / "data"), writers.write_coco(tmp_path / "coco")
    for split, count in (("train", 3), ("val", 2)):
        assert_identical_targets(root, reference, split, count)
    dataset, report = dataset_of(root, "train")
    assert [len(target["boxes"]) for _, target in dataset] == [2, 0, 12]
    assert report.lines() == []


def write_voc_with_classes(root, data, names, images):
    writers.write_voc(root, data, images)
    (root / "classes.txt").write_text("\n".join(names))  # the order is not that of the alphabet


@pytest.mark.parametrize(
    "write", [writers.write_roboflow, writers.write_yolo, write_voc_with_classes]
)
def test_every_layout_gives_identical_targets_of_real_data(test_data, tmp_path, write):
    content = json.loads((test_data / "bccd/instances_val.json").read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    objects = {entry["id"]: [] for entry in content["images"]}
    for thing in content["annotations"]:
        objects[thing["image_id"]].append((names[thing["category_id"]], tuple(thing["bbox"])))
    pictures = [
        writers.Picture(entry["file_name"], entry["width"], entry["height"], objects[entry["id"]])
        for entry in content["images"]
    ]
    data, images = {"val": pictures}, test_data / "bccd/images"
    names = list(names.values())
    write(tmp_path / "data", data, names, images)
    writers.write_coco(tmp_path / "coco", data, names, images)
    assert_identical_targets(tmp_path / "data", tmp_path / "coco", "val", 87)
    dataset, _ = dataset_of(tmp_path / "data", "val")
    assert sum(dataset.box_counts().values()) == len(content["annotations"]) == 1137
    assert list(dataset.class_names.values()) == names == ["RBC", "WBC", "Platelets"]
