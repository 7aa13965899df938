# SPDX-License-Identifier: Apache-2.0
"""Any JSON in any field: the reader makes sound columns of it, or says in one line why not."""

import json
import os
import time
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from detr_fast.data.annotations import CocoAnnotations, DatasetError, read_json
from detr_fast.data.coco import CocoDetection
from detr_fast.data.coco_format import leaves_folder
from detr_fast.data.validate import DataReport, leave_out_missing_images

SIZE = (20, 30)  # height and width of every image that is opened
FILES = ("a.png", "b.png", "sub/c.png")

text = st.text(st.characters(), max_size=8)  # surrogates and controls included
numbers = st.one_of(
    st.integers(-3, 40),
    st.integers(),
    st.sampled_from([2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**400]),
    st.floats(),
    st.floats(-50, 50),
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, text),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(text, inner, max_size=4),
    max_leaves=8,
)


def mostly(usual, odds=6, odd=anything):
    """A strategy that once in ``odds`` draws gives something odd."""
    return st.sampled_from([False] * (odds - 1) + [True]).flatmap(
        lambda is_odd: odd if is_odd else usual
    )


def entry(**fields):
    """An object with these fields: mostly all as usual, else one odd field, or many, or none."""
    usual = st.fixed_dictionaries(fields)
    change = st.dictionaries(st.sampled_from(list(fields)), anything, min_size=1, max_size=2)
    changed = st.builds(lambda entry, odd: entry | odd, usual, change)
    some = st.fixed_dictionaries({}, optional={k: mostly(v) for k, v in fields.items()})
    return mostly(usual, 3, mostly(changed, 4, mostly(some, 4)))


WHOLE = {
    "images": [{"id": i, "file_name": f, "height": 20, "width": 30} for i, f in enumerate(FILES)],
    "categories": [{"id": 0, "name": "cat"}, {"id": 3, "name": "dög", "supercategory": "cat"}],
    "annotations": [
        {"id": i, "image_id": i % 3, "category_id": 3 * (i % 2), "bbox": [i, 1.5, 3, 4e0]}
        for i in range(6)
    ],
}

names = mostly(
    st.sampled_from(FILES),
    4,
    st.sampled_from(["gone.png", "../a.png", "/a.png", "x/../a.png"]) | text,
)
boxes = st.tuples(*[st.floats(-5, 25) | st.integers(-5, 25)] * 2, *[st.floats(-1, 30)] * 2).map(
    list
)
images = entry(
    id=st.integers(0, 4), file_name=names, height=st.sampled_from([0, 20]), width=st.just(30)
)
annotations = entry(
    id=st.integers(0, 5),
    image_id=st.integers(0, 2),
    category_id=st.sampled_from([3, 3, 3.0, 0, 0, 4]),
    bbox=boxes,
    area=st.floats(0, 400),
    iscrowd=st.integers(0, 1),
)
categories = mostly(
    st.sampled_from(
        [
            [{"id": 0, "name": "cat"}, {"id": 3, "name": "dog"}],
            [{"id": 0, "name": "cat"}, {"id": 3, "name": "cat"}, {"id": 3, "name": "cat"}],
            [{"id": i, "name": "abcd"[i], "supercategory": "-aab"[i]} for i in range(4)],
        ]
    ),
    3,
    st.lists(
        entry(
            id=st.integers(0, 9), name=st.sampled_from("abc"), supercategory=st.sampled_from("abc")
        ),
        max_size=4,
    ),
)
contents = st.fixed_dictionaries(
    {
        "images": mostly(
            st.builds(
                lambda usual, odd: usual + odd,
                st.lists(st.sampled_from(WHOLE["images"]), unique_by=id, min_size=1),
                st.lists(images, max_size=3),
            ),
            40,
        ),
        "annotations": mostly(st.lists(annotations, min_size=1, max_size=12), 40),
        "categories": mostly(categories, 40),
    }
)


@st.composite
def documents(draw):
    """The bytes of a JSON file that was cut off, overwritten or put together wrongly."""
    data = bytearray(json.dumps(WHOLE, ensure_ascii=draw(st.booleans())).encode())
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        until = draw(st.integers(at, min(at + 12, len(data))))
        data[at:until] = draw(
            st.binary(max_size=6)
            | st.sampled_from(
                [b"null", b"1e999", b"NaN", b"-Infinity", b"[", b"}", b",", b'"', b"-"]
            )
        )
    return bytes(data[: draw(st.none() | st.integers(0, len(data)))])


def assert_is_said(line):
    assert line.strip()
    assert line.isprintable()  # one line, that every terminal takes


def read(content, report=None):
    """The annotations, or None where an error was raised that says why."""
    try:
        return CocoAnnotations.from_dict(content, "boxes.json", report)
    except DatasetError as error:
        assert_is_said(str(error))
        return None


def left_out(report, *starts):
    return sum(
        count
        for kind, count in report.counts.items()
        if kind.startswith(starts) and kind.endswith("(left out)")
    )


def assert_is_sound(table, content, report):
    assert (table.image_ids[1:] > table.image_ids[:-1]).all()
    assert table.file_names.shape == table.image_ids.shape
    for name in table.file_names.tolist():
        assert name
        assert not leaves_folder(name)
    assert table.sizes.shape == (len(table.image_ids), 2)
    assert (table.sizes >= 0).all()
    assert (len(table.starts), table.starts[0], table.starts[-1]) == (
        len(table.image_ids) + 1, 0, len(table.boxes),
    )  # fmt: skip
    assert (np.diff(table.starts) >= 0).all()
    assert np.isfinite(table.boxes).all()
    assert (table.boxes[:, 2:] > 0).all()
    assert set(table.labels.tolist()) <= set(table.class_names)
    assert np.isfinite(table.areas).all()
    assert (table.areas >= 0).all()
    assert set(table.crowds.tolist()) <= {0, 1}
    assert table.boxes.shape == (len(table.labels), 4)
    assert len(table.labels) == len(table.areas) == len(table.crowds)
    assert table.class_names
    assert all(i >= 0 and name and name.isprintable() for i, name in table.class_names.items())
    assert sum(table.box_counts().values()) == (table.crowds == 0).sum()

    gone = left_out(report, "annotations", "boxes")
    assert len(content["annotations"]) == len(table.boxes) + gone
    assert len(content["images"]) == len(table.image_ids) + left_out(report, "images")
    for line in (*report.lines(), *report.notes):
        assert_is_said(line)

    again = read(json.loads(json.dumps(table.to_dict())))
    for column in ("image_ids", "file_names", "sizes", "starts", "boxes", "labels", "areas"):
        assert getattr(again, column).tolist() == getattr(table, column).tolist()


def assert_can_be_trained_on(table, folder):
    def open_image(path, size):
        return torch.zeros(3, *SIZE, dtype=torch.uint8)

    try:
        dataset = CocoDetection(folder, table, lambda image, target: (image, target))
    except DatasetError as error:
        assert_is_said(str(error))
        assert not len(table.image_ids)
        return
    labels = set()
    with mock.patch("detr_fast.data.coco.read_image", open_image):
        for index in range(len(dataset)):
            _, target = dataset[index]
            boxes = target["boxes"]
            assert (boxes[:, :2] >= 0).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert (boxes[:, 2:] <= boxes.new_tensor(SIZE[::-1])).all()
            assert len(boxes) == len(target["labels"]) == len(target["area"])
            assert dataset.index_of(int(target["image_id"])) == index
            labels.update(target["labels"].tolist())
    counts = dataset.box_counts()
    assert labels <= {label for label, count in counts.items() if count}
    assert set(dataset.class_names) == set(counts) == set(range(dataset.num_classes))

    report = DataReport("boxes.json")
    try:
        there = leave_out_missing_images(table, folder, report)
    except DatasetError as error:
        assert_is_said(str(error))
        assert not set(FILES) & set(table.file_names.tolist())
    else:
        assert len(there.image_ids) + len(report) == len(table.image_ids)
        for line in report.lines():
            assert_is_said(line)


def check_content(content, folder):
    report = DataReport("boxes.json")
    table = read(content, report)
    strict = read(content)
    if table is None:
        assert strict is None
        return
    assert_is_sound(table, content, report)
    if not report:
        assert strict.to_dict() == table.to_dict()
    assert_can_be_trained_on(table, folder)


def check_document(data, folder):
    path = folder / "boxes.json"
    path.write_bytes(data)
    try:
        content = read_json(path)
    except DatasetError as error:
        assert_is_said(str(error))
    else:
        check_content(content, folder)


SUBJECTS = {
    "fields": (contents, check_content),
    "documents": (documents(), check_document),
    "anything": (anything, check_content),
}


def fuzz(subject, folder, examples, number):
    strategy, check = SUBJECTS[subject]
    count = 0

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value):
        nonlocal count
        count += 1
        check(value, folder)

    run()
    return count


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    for name in FILES:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(("subject", "examples"), [("fields", 150), ("documents", 150)])
def test_reader_takes_any_json(folder, subject, examples):
    assert fuzz(subject, folder, examples, number=0) >= examples


@pytest.mark.long
def test_reader_takes_any_json_for_long(folder, capsys):
    seconds = float(os.environ.get("DETR_FAST_FUZZ_SECONDS", 1200))
    end, number = time.monotonic() + seconds, time.time_ns()
    counts = dict.fromkeys(SUBJECTS, 0)
    while time.monotonic() < end:
        for subject in SUBJECTS:
            number += 1
            counts[subject] += fuzz(subject, folder, 100 if subject == "anything" else 400, number)
    with capsys.disabled():
        print(f"\n{sum(counts.values())} examples in {seconds:.0f} s: {counts}")
