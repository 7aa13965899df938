# SPDX-License-Identifier: Apache-2.0
import shutil
import sys

import pytest

from detr_fast.data.annotations import DatasetError
from detr_fast.data.layouts import find_layout
from detr_fast.data.validate import DataReport
from tests.data import layout_writers as writers
from tests.data.test_layouts import as_written, by_name, contents


@pytest.fixture
def root(tmp_path):
    return writers.write_voc(tmp_path / "data")


def read(root, split="train", **options):
    report = DataReport("data")
    content = find_layout(root, **options).source(split).read(report)
    return content, report.lines()


def xml(root, name):
    return root / f"Annotations/{name}.xml"


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("first", [0, 1])
def test_what_pixels_are_counted_from_is_said(tmp_path, first):
    root = writers.write_voc(tmp_path / "data", first=first)
    report = DataReport("voc")
    content = find_layout(root).source("train").read(report)
    assert [note.rpartition(": ")[2] for note in report.notes] == [
        f"coordinates are counted from {first}"
    ]
    assert len(content["images"]) == 3


def test_one_corner_below_1_in_the_other_split_tells(tmp_path):
    root = writers.write_voc(tmp_path / "data")  # v1: a box in the corner, at 1, 1
    before, _ = read(root)
    edit(xml(root, "v1"), "<ymin>1</ymin>", "<ymin>0</ymin>")
    after, _ = read(root)
    (x, y, w, h), moved = before["annotations"][0]["bbox"], after["annotations"][0]["bbox"]
    assert moved == [x + 1, y + 1, w - 1, h - 1]


def test_classes_come_in_alphabetical_order_of_all_splits(tmp_path):
    data = {
        "train": [writers.Picture("a.png", 9, 9, [("zebra", (1, 1, 2, 2))])],
        "val": [writers.Picture("b.png", 9, 9, [("ant", (1, 1, 2, 2))])],
    }
    root = writers.write_voc(tmp_path / "data", data)
    for content in contents(find_layout(root)).values():
        assert content["categories"] == [{"id": 0, "name": "ant"}, {"id": 1, "name": "zebra"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "cup\n\nbear\n"),
        (
            "labelmap.txt",
            "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncup:1,2,3::\nbear:::",
        ),
    ],
)
def test_a_file_gives_the_order_of_the_classes(root, name, text):
    (root / name).write_text(text)
    content, problems = read(root)
    assert content["categories"] == [{"id": 0, "name": "cup"}, {"id": 1, "name": "bear"}]
    assert [thing["category_id"] for thing in content["annotations"]] == [1] + [0] * 12
    assert problems == [
        f"data: 1 objects of classes that {root / name} does not list (left out): "
        f"{xml(root, 'a')}: object 2 ('apple')"
    ]
    assert f"classes of {name}" in find_layout(root).said


def test_difficult_objects(tmp_path):
    root = writers.write_voc(tmp_path / "data", difficult={0})
    assert by_name(read(root)[0]) == as_written(writers.DATA["train"])
    content, problems = read(root, remove_difficult=True)
    easy = [p._replace(objects=p.objects[1:]) for p in writers.DATA["train"]]
    assert by_name(content) == as_written(easy)
    assert [entry["name"] for entry in content["categories"]] == writers.NAMES
    assert problems == []
    assert find_layout(root, remove_difficult=True).said.endswith("difficult objects left out")


def test_size_is_read_from_the_image_where_the_xml_has_none(tmp_path):
    root = writers.write_voc(tmp_path / "data", size=False)
    edit(
        xml(root, "b"), "</filename>", "</filename><size><width>0</width><height>5</height></size>"
    )
    (root / "JPEGImages/c 1.x.jpg").write_text("no image")
    content, problems = read(root)
    assert by_name(content) == as_written(writers.DATA["train"][:2])
    assert problems == [
        "data: 1 images whose header cannot be read (left out): "
        f"{root}/JPEGImages/c 1.x.jpg (UnidentifiedImageError)"
    ]


@pytest.mark.parametrize("written", ["old.jpg", "C:\\me\\old.jpg", "/me/old.jpg", "v2.jpg", ""])
def test_stale_file_names_yield_to_the_name_of_the_xml(root, written):
    edit(xml(root, "a"), "<filename>a.png<", f"<filename>{written}<")
    content, problems = read(root)
    assert by_name(content) == as_written(writers.DATA["train"])
    assert problems == []


def test_file_name_tells_where_the_xml_has_another_name(root):
    xml(root, "a").rename(xml(root, "first"))
    listing = root / "ImageSets/Main/train.txt"
    listing.write_text(listing.read_text().replace("a\n", "first\n", 1))
    shutil.copy(root / "JPEGImages/b.jpg", root / "JPEGImages/b.bmp")  # and of two, the named one
    content, problems = read(root)
    assert by_name(content) == as_written(writers.DATA["train"])
    assert problems == []


@pytest.mark.parametrize("written", ["../../secret.png", "/etc/secret.png"])
@pytest.mark.parametrize("size", [True, False])
def test_file_name_outside_the_folder_is_passed_on_unopened(tmp_path, written, size):
    root = writers.write_voc(tmp_path / "data", size=size)
    shutil.copy(root / "JPEGImages/a.png", tmp_path / "secret.png")
    (root / "JPEGImages/a.png").unlink()
    edit(xml(root, "a"), "<filename>a.png<", f"<filename>{written}<")
    content, problems = read(root)
    found = {e["file_name"]: (e["width"], e["height"]) for e in content["images"]}
    assert found[written] == ((40, 30) if size else (0, 0))
    assert problems == []


def test_lists_of_the_splits(root):
    listing = root / "ImageSets/Main/train.txt"
    listing.write_text("\ufeffb.jpg\n\na\na\nlost\n../../x\n/etc/x\n")
    content, problems = read(root)
    assert [entry["file_name"] for entry in content["images"]] == ["a.png", "b.jpg"]
    assert problems == [
        f"data: 1 images listed twice (taken once): {listing}:4",
        f"data: 1 images without an XML file (left out): {listing}:5 ({xml(root, 'lost')})",
        f"data: 2 names that leave the folder (left out): {listing}:6, {listing}:7",
    ]


def test_published_voc_2007(root):
    lists = root / "ImageSets/Main"
    shutil.copy(lists / "train.txt", lists / "trainval.txt")
    assert "train: train.txt, val: val.txt" in find_layout(root).said
    (lists / "train.txt").unlink()  # trainval.txt would hold the images of val.txt
    with pytest.raises(DatasetError, match=r"Main/train\.txt does not exist: it lists the images"):
        find_layout(root).source("train")
    (lists / "val.txt").rename(lists / "test.txt")
    layout = find_layout(root)
    assert "train: trainval.txt, val: test.txt" in layout.said
    assert by_name(contents(layout)["val"]) == as_written(writers.DATA["val"])


@pytest.mark.parametrize("parent", ["", "VOCdevkit"])
def test_parent_folder(tmp_path, parent):
    root = writers.write_voc(tmp_path / parent / "VOC2007")
    assert by_name(contents(find_layout(tmp_path))["train"]) == as_written(writers.DATA["train"])
    shutil.copytree(root, root.with_name("VOC2012"))
    with pytest.raises(DatasetError, match=r"holds .*VOC2007, .*VOC2012; name one of them"):
        find_layout(tmp_path)


def test_without_lists_of_the_splits(root):
    shutil.rmtree(root / "ImageSets")
    with pytest.raises(DatasetError, match=r"without its splits: .*Main/train\.txt does not exist"):
        find_layout(root)


def test_images_beside_their_xml(tmp_path):
    root = writers.write_voc_side_by_side(tmp_path / "data")
    (root / "train/b.xml").unlink()
    (root / "train/a.xml").rename(root / "train/first.xml")
    (root / "train/._a.xml").write_text("left by a Mac")
    content, problems = read(root)
    assert by_name(content) == as_written([writers.DATA["train"][i] for i in (0, 2)])
    assert problems == [f"data: 1 images without an XML file (left out): {root}/train/b.jpg"]


ENTITIES = """<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>
<annotation><filename>&b;</filename></annotation>"""
OUTSIDE = """<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>
<annotation><filename>&a;</filename></annotation>"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "ParseError: no element found"),
        ("<annotation><object>", "ParseError: no element found"),
        ("no xml", "ParseError: syntax error"),
        (ENTITIES, "EntitiesForbidden"),
        (OUTSIDE, "EntitiesForbidden"),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "unknown encoding"),
        ("<html></html>", "holds <html>, not <annotation>"),
    ],
)
def test_malformed_and_hostile_xml_is_named(root, text, reason):
    xml(root, "a").write_text(text)
    content, problems = read(root)
    assert by_name(content) == as_written(writers.DATA["train"][1:])
    assert len(problems) == 1
    assert problems[0].startswith(
        f"data: 1 XML files that cannot be read (image left out): {xml(root, 'a')} ("
    )
    assert reason in problems[0]
    assert "\n" not in problems[0]
    # that of one split is no problem of the other, though both tell the classes
    assert read(root, "val")[1] == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<name>bear</name>", ""),
        ("<name>bear</name>", "<name> </name>"),
        ("<xmin>2</xmin>", ""),
        ("<xmin>2</xmin>", "<xmin>two</xmin>"),
        ("<xmin>2</xmin>", "<xmin>nan</xmin>"),
        ("<xmin>2</xmin>", "<xmin>1e999</xmin>"),
        ("bndbox", "box"),
    ],
)
def test_objects_without_name_or_box_are_named(root, old, new):
    edit(
        xml(root, "a"), f"<{old}>" if old == "bndbox" else old, f"<{new}>" if new == "box" else new
    )
    if new == "box":
        edit(xml(root, "a"), "</bndbox>", "</box>")
    content, problems = read(root)
    left = [writers.DATA["train"][0]._replace(objects=writers.DATA["train"][0].objects[1:])]
    assert by_name(content) == as_written(left + writers.DATA["train"][1:])
    assert problems == [
        f"data: 1 objects without name or box (left out): {xml(root, 'a')}: object 1"
    ]


def test_parts_of_an_object_have_boxes_of_their_own(root):
    part = "<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part><name>bear</name>"
    edit(xml(root, "a"), "<name>bear</name>", part)
    assert by_name(read(root)[0]) == as_written(writers.DATA["train"])


def test_nothing_that_can_be_read(root):
    for file in (root / "Annotations").iterdir():
        file.write_text("<a>")
    with pytest.raises(DatasetError, match=r"train\.txt: no annotation can be read; the first"):
        read(root)


def test_without_defusedxml_the_remedy_is_named(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "defusedxml.ElementTree", None)
    with pytest.raises(ImportError, match=r'needs defusedxml: pip install "detr-fast\[train\]"'):
        read(root)
