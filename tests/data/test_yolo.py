# SPDX-License-Identifier: Apache-2.0
import shutil
import sys

import pytest
from PIL import ExifTags, Image

from detr_fast.data.annotations import DatasetError
from detr_fast.data.layouts import find_layout
from detr_fast.data.validate import DataReport
from detr_fast.data.yolo import label_path
from tests.data import layout_writers as writers
from tests.data.test_layouts import as_written, by_name, contents


@pytest.fixture
def root(tmp_path):
    return writers.write_yolo(tmp_path / "data")


def read(root, split="train"):
    report = DataReport("data")
    content = find_layout(root).source(split).read(report)
    return content, report.lines()


def rewrite(root, text):
    (root / "data.yaml").write_text(text)
    return root


NAMES = "names: [apple, bear, cup]"


@pytest.mark.parametrize(
    "text",
    [
        f"train: images/train\nval: images/val\n{NAMES}",
        f"path: .\ntrain: [images/train]\nval: [images/val]\n{NAMES}",
        f"train: ./images/train\nvalid: ./images/val\n{NAMES}",
        "train: images/train\nval: images/val\nnames: {2: cup, 0: apple, 1: bear}",
        # as exports of Roboflow have it: nothing lies there
        f"train: ../images/train\nval: ../images/val\n{NAMES}",
        # written on another machine
        f"path: /content/elsewhere\ntrain: images/train\nval: images/val\n{NAMES}",
        f"\ufefftrain: images/train # bytes of a BOM\nval: images/val\ntest:\n{NAMES}\nnc: 3",
    ],
)
def test_yaml_in_its_variants(root, text):
    layout = find_layout(rewrite(root, text))
    for split, content in contents(layout).items():
        assert by_name(content) == as_written(writers.DATA[split])
    assert contents(find_layout(root / "data.yaml")) == contents(layout)


def test_yaml_beside_the_data(tmp_path):
    writers.write_yolo(tmp_path / "sets/cells")
    (tmp_path / "sets/cells/data.yaml").unlink()
    (tmp_path / "cells.yml").write_text(
        f"path: sets/cells\ntrain: images/train\nval: images/val\n{NAMES}"
    )
    layout = find_layout(tmp_path)  # the only yaml file there
    assert layout.said.startswith("data: YOLO (cells.yml), 3 classes")
    assert by_name(contents(layout)["train"]) == as_written(writers.DATA["train"])


def test_several_folders_have_a_common_root(root):
    rewrite(root, f"train: [images/train, images/val]\nval: images/val\n{NAMES}")
    layout = find_layout(root)
    assert layout.source("train").images == root / "images"
    content, problems = read(root)
    names = [f"{split}/{p.name}" for split, pictures in writers.DATA.items() for p in pictures]
    assert [entry["file_name"] for entry in content["images"]] == names
    assert len(content["annotations"]) == 17
    assert problems == []


@pytest.mark.parametrize("beside", ["lists/", ""])
def test_a_text_file_lists_the_images(root, tmp_path, beside):
    rewrite(root, f"train: lists/train.txt\nval: images/val\n{NAMES}")
    (root / "lists").mkdir()
    up = "../" if beside else "./"  # relative to the list, or to the data set
    outside = tmp_path / "outside.png"
    shutil.copy(root / "images/train/a.png", outside)
    lines = [
        f"{up}images/train/a.png",
        "",
        str(root / "images/train/b.jpg"),
        f"{up}images/train/a.png",
        "notes.md",
        f"{up}../outside.png",
        str(outside),
        f"{up}images/train/lost.png",
    ]
    (root / "lists/train.txt").write_text("\n".join(lines))
    content, problems = read(root)
    assert find_layout(root).source("train").images == root
    outsiders = sorted([f"{up}../outside.png", str(outside)])
    inside = ["images/train/a.png", "images/train/b.jpg"]
    assert sorted(e["file_name"] for e in content["images"]) == sorted([*outsiders, *inside])
    sizes = {e["file_name"]: (e["width"], e["height"]) for e in content["images"]}
    assert sizes["images/train/b.jpg"] == (33, 57)
    assert [sizes[name] for name in outsiders] == [(0, 0)] * 2  # not opened, left to the check
    assert len(content["annotations"]) == 2
    assert problems == [
        f"data: 1 lines that name no image (left out): {root}/lists/train.txt:5",
        f"data: 1 images listed twice (taken once): {root}/lists/train.txt: {up}images/train/a.png",
        "data: 1 images whose header cannot be read (left out): "
        f"{root}/images/train/lost.png (no such file)",
    ]


def test_folders_without_yaml(tmp_path):
    for folders in ("{what}/{split}", "{split}/{what}"):
        root = writers.write_yolo(tmp_path / folders[1:5], folders=folders)
        (root / "data.yaml").unlink()
        layout = find_layout(root)
        assert (
            layout.said == "data: YOLO, class numbers taken as names, boxes as shares of the image"
        )
        for split, content in contents(layout).items():
            # of both splits: those of val alone are 0 and 2
            assert [entry["name"] for entry in content["categories"]] == ["0", "1", "2"]
            numbers = {name: str(number) for number, name in enumerate(writers.NAMES)}
            renamed = [
                p._replace(objects=[(numbers[name], box) for name, box in p.objects])
                for p in writers.DATA[split]
            ]
            assert by_name(content) == as_written(renamed)
        (root / "classes.txt").write_text("apple\nbear\ncup\n\n")
        layout = find_layout(root)
        assert layout.said.startswith("data: YOLO (classes.txt), 3 classes")
        assert by_name(contents(layout)["val"]) == as_written(writers.DATA["val"])


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_the_validation_split(tmp_path, name):
    root = writers.write_yolo(tmp_path / "data")
    (root / "data.yaml").unlink()
    for what in ("images", "labels"):
        (root / what / "val").rename(root / what / name)
    assert len(contents(find_layout(root))["val"]["images"]) == 2


def test_folder_without_labels_is_named(tmp_path):
    root = writers.write_yolo(tmp_path / "data")
    (root / "data.yaml").unlink()
    shutil.rmtree(root / "labels/val")
    with pytest.raises(DatasetError, match=r"labels/val does not exist"):
        find_layout(root).source("val")


def test_six_decimals_are_near(tmp_path):
    root = writers.write_yolo(tmp_path / "data", number="{:.6f}".format)
    for split, content in contents(find_layout(root)).items():
        wanted = [(p, box) for p in writers.DATA[split] for _, box in p.objects]
        assert len(wanted) == len(content["annotations"])
        for (picture, box), thing in zip(wanted, content["annotations"], strict=True):
            longest = max(picture.width, picture.height)
            assert thing["bbox"] == pytest.approx(box, abs=1e-6 * longest, rel=0)


def test_polygons_become_their_bounding_box(root):
    file = root / "labels/train/a.txt"
    file.write_text("1 0.25 0.5 0.75 0.2 0.5 0.9\n2 .1 .1 .2 .1 .2 .3 .1 .3\n")
    content, problems = read(root)
    boxes = [thing["bbox"] for thing in content["annotations"][:2]]  # 40 x 30 pixels
    assert boxes[0] == pytest.approx([10, 6, 20, 21])
    assert boxes[1] == pytest.approx([4, 3, 4, 6])
    assert problems == []


def test_keypoints_are_no_polygon(root):
    (root / "data.yaml").write_text(
        f"train: images/train\nval: images/val\n{NAMES}\nkpt_shape: [2, 3]"
    )
    file = root / "labels/train/a.txt"
    file.write_text("1 .5 .5 .5 .5 .1 .1 2 .9 .9 2\n0 .5 .5 .5 .5\n")
    content, problems = read(root)
    assert content["annotations"][0]["bbox"] == [10, 7.5, 20, 15]
    assert problems[0].startswith("data: 13 malformed label lines (left out): ")
    assert f"{file}:2 (5 numbers)" in problems[0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("cup .5 .5 .5 .5", "not numbers"),
        ("1 .5 .5 .5 x", "not numbers"),
        ("1,.5,.5,.5,.5", "not numbers"),
        ("1 .5 .5 .5", "4 numbers"),
        ("1 .5 .5 .5 .5 .9", "6 numbers"),
        ("1 .1 .1 .2 .1 .2 .2 .3", "8 numbers"),
        ("1", "1 numbers"),
        ("1.5 .5 .5 .5 .5", "class 1.5 is no class number"),
        ("-1 .5 .5 .5 .5", "class -1 is no class number"),
        ("1e30 .5 .5 .5 .5", "class 1e30 is no class number"),
        ("1 .5 .5 nan .5", "not finite"),
        ("inf .5 .5 .5 .5", "not finite"),
        ("1 .1 .1 .2 .1 .2 1e999", "not finite"),
        ("\x00\x01", "not numbers"),
    ],
)
def test_malformed_lines_are_named_and_left_out(root, line, reason):
    file = root / "labels/train/a.txt"
    file.write_text(f"0 .5 .5 .5 .5\n\n{line}\n2.0 .5 .5 .5 .5\n")
    content, problems = read(root)
    assert [thing["category_id"] for thing in content["annotations"][:2]] == [0, 2]
    assert problems == [f"data: 1 malformed label lines (left out): {file}:3 ({reason})"]


def test_bytes_that_editors_leave_behind(root):
    file = root / "labels/train/a.txt"
    file.write_bytes(b"\xef\xbb\xbf1 .5 .5 .5 .5\r\n\xff\xfe .5 .5 .5 .5\r\n0 .5 .5 .5 .5")
    content, problems = read(root)
    assert [thing["category_id"] for thing in content["annotations"][:2]] == [1, 0]
    assert problems == [f"data: 1 malformed label lines (left out): {file}:2 (not numbers)"]


def test_strange_boxes_are_passed_on(root):
    """The annotation reader reports them for all layouts."""
    (root / "labels/train/a.txt").write_text("1 .5 .5 0 -.5\n2 5 5 .5 .5\n")
    content, problems = read(root)
    boxes = [thing["bbox"] for thing in content["annotations"][:2]]
    assert boxes == [[20, 22.5, 0, -15], [190, 142.5, 20, 15]]
    assert problems == []


def test_classes_without_a_name_are_named_and_left_out(root):
    file = root / "labels/train/a.txt"
    file.write_text("3 .5 .5 .5 .5\n2 .5 .5 .5 .5\n")
    content, problems = read(root)
    assert content["annotations"][0]["category_id"] == 2
    assert problems == [
        "data: 1 label lines of classes that data.yaml does not list (left out): "
        f"{file}:1 (class 3)"
    ]


@pytest.mark.parametrize("orientation", [1, 6])
def test_shares_of_a_turned_photo_are_of_what_is_seen_upright(root, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (40, 30)).save(root / "images/train/turned.jpg", exif=exif)
    (root / "labels/train/turned.txt").write_text("0 .5 .5 .5 .25\n")
    content, _ = read(root)
    size = {1: (40, 30), 6: (30, 40)}[orientation]
    assert (content["images"][-1]["width"], content["images"][-1]["height"]) == size
    assert content["annotations"][-1]["bbox"] == [
        0.25 * size[0],
        0.375 * size[1],
        0.5 * size[0],
        0.25 * size[1],
    ]


def test_unreadable_images_and_labels(root):
    (root / "images/train/a.png").write_text("no image")
    (root / "labels/train/b.txt").mkdir()
    content, problems = read(root)
    assert [entry["file_name"] for entry in content["images"]] == ["b.jpg", "c 1.x.jpg"]
    assert problems == [
        "data: 1 images whose header cannot be read (left out): "
        f"{root}/images/train/a.png (UnidentifiedImageError)",
        f"data: 1 label files that cannot be read: {root}/labels/train/b.txt (Is a directory)",
    ]


def test_hidden_files_and_other_files_are_no_images(root):
    for name in ("._a.png", ".trash/x.png", "Thumbs.db", "notes.txt"):
        (root / "images/train" / name).parent.mkdir(exist_ok=True)
        (root / "images/train" / name).write_text("x")
    content, problems = read(root)
    assert by_name(content) == as_written(writers.DATA["train"])
    assert problems == []


def test_no_label_file_at_all(root):
    shutil.rmtree(root / "labels/train")
    with pytest.raises(DatasetError) as caught:
        read(root)
    assert str(caught.value) == (
        f"{root}/images/train: none of 3 images has a label file; the first was looked for at "
        f"{root}/labels/train/a.txt"
    )


def test_no_image_at_all(root):
    shutil.rmtree(root / "images/train")
    (root / "images/train").mkdir()
    with pytest.raises(DatasetError, match=r"images/train: holds no images"):
        read(root)


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("/d/images/train/a.b.png", "/d/labels/train/a.b.txt"),
        ("/images/x/images/a.png", "/images/x/labels/a.txt"),
        ("/d/train/a.png", "/d/train/a.txt"),
        ("/d/my_images/images", "/d/my_images/images.txt"),
    ],
)
def test_where_a_label_file_lies(image, labels):
    assert label_path(image) == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", r"data\.yaml: no valid YAML \(while parsing"),
        ("[" * 5000, r"data\.yaml: no valid YAML"),
        ("!!python/object/apply:os.system ['true']", r"no valid YAML \(could not determine"),
        ("just text", r"expected a YOLO data file with 'train', 'val' and 'names'"),
        ("train: images/train", r"expected a YOLO data file"),
        ("train: images/train\nnc: many", r"'nc' must be the number of classes, found 'many'"),
        ("train: images/train\nnc: 0", r"'nc' must be the number of classes, found 0"),
        ("train: images/train\nnames: []", r"'names' must list the class names, found \[\]"),
        ("train: images/train\nnames: [[a]]", r"'names' must list the class names"),
        ("train: images/train\nnames: {a: b}", r"'names' must list the class names"),
        ("train: images/train\nnames: {-1: b}", r"'names' must list the class names"),
        ("train: images/train\nnames: [a]\nnc: 2", r"'nc' is 2, but 'names' lists 1"),
        ("train: 7\nnames: [a]", r"'train' names no folder of images"),
        ("val: images/val\nnames: [a]", r"'train' names no folder of images"),
        ("train: images/none\nnames: [a]", r"data/images/none \(named by .*\) does not exist"),
    ],
)
def test_malformed_yaml_is_named(root, text, message):
    rewrite(root, text)
    with pytest.raises(DatasetError, match=message) as caught:
        find_layout(root / "data.yaml").source("train")
    assert "\n" not in str(caught.value)


def test_names_may_be_no_more_than_a_number(root):
    rewrite(root, "train: images/train\nval: images/val\nnc: 4")
    content, _ = read(root)
    assert content["categories"] == [{"id": n, "name": str(n)} for n in range(4)]


def test_yaml_files_of_other_tools_are_passed_over(root):
    (root / "data.yaml").rename(root / "cells.yaml")
    (root / "config.yaml").write_text("tool: !other {}")
    (root / "plan.yml").write_text("- 1")
    assert find_layout(root).said.startswith("data: YOLO (cells.yaml)")
    shutil.copy(root / "cells.yaml", root / "more.yaml")
    with pytest.raises(DatasetError, match=r"cells\.yaml, more\.yaml describe a data set each"):
        find_layout(root)
    shutil.copy(root / "cells.yaml", root / "data.yaml")
    assert find_layout(root).said.startswith("data: YOLO (data.yaml)")


def test_without_pyyaml_the_remedy_is_named(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r'data\.yaml needs PyYAML: pip install "detr-fast\[tr'):
        find_layout(root)
