# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from detr_fast.data.labels import COCO_CATEGORIES, LabelMap


def test_own_categories_count_from_zero_by_their_ids():
    labels = LabelMap.from_categories({40: "dog", 7: "cat", 10**12: "bird", 0: "cow"})
    assert labels.names == {0: "cow", 1: "cat", 2: "dog", 3: "bird"}
    assert list(labels.names) == [0, 1, 2, 3]
    assert labels.num_classes == 4


def test_table_of_official_categories(test_data):
    content = json.loads((test_data / "coco125/annotations/instances_val2017.json").read_text())
    assert {c["id"]: c["name"] for c in content["categories"]} == COCO_CATEGORIES


def test_official_categories_keep_their_ids():
    backwards = dict(reversed(COCO_CATEGORIES.items()))
    labels = LabelMap.from_categories(backwards)
    assert labels.names == COCO_CATEGORIES
    assert labels.num_classes == 91
    assert labels.labels_of(COCO_CATEGORIES) == {i: i for i in COCO_CATEGORIES}
    assert labels == LabelMap.from_names(COCO_CATEGORIES, 91)


@pytest.mark.parametrize(
    "categories",
    [
        {i: name for i, name in COCO_CATEGORIES.items() if i != 90},
        COCO_CATEGORIES | {90: "toothpaste"},
        COCO_CATEGORIES | {12: "street sign"},
        dict(enumerate(COCO_CATEGORIES.values())),
    ],
)
def test_almost_official_categories_are_own_data(categories):
    labels = LabelMap.from_categories(categories)
    assert list(labels.names.values()) == list(dict(sorted(categories.items())).values())
    assert list(labels.names) == list(range(len(categories)))
    assert labels.num_classes == len(categories)


def test_another_file_is_mapped_by_name():
    labels = LabelMap.from_categories({3: "cat", 17: "dog", 20: "cow"})
    other = {0: "dog", 1: "unicorn", 5: "cat"}
    assert labels.labels_of(other) == {0: 1, 5: 0}
    assert labels.category_ids_of(other) == {1: 0, 0: 5}
    assert labels.labels_of({1: "Cat"}) == {}


def test_official_labels_of_a_list_that_counts_from_zero():
    labels = LabelMap.from_categories(COCO_CATEGORIES)
    counted = dict(enumerate(COCO_CATEGORIES.values()))
    assert labels.category_ids_of(counted)[90] == 79
    assert list(labels.labels_of(counted).values()) == list(COCO_CATEGORIES)


def test_repeated_names_are_told_apart():
    categories = {3: "cell", 7: "cell", 9: "platelet"}
    labels = LabelMap.from_categories(categories)
    assert labels.names == {0: "cell (3)", 1: "cell (7)", 2: "platelet"}
    assert labels.labels_of(categories) == {3: 0, 7: 1, 9: 2}


def test_names_stay_unique_where_a_name_looks_like_one_with_its_id():
    categories = {3: "cell", 7: "cell", 9: "cell (3)"}
    labels = LabelMap.from_categories(categories)
    assert labels.names == {0: "cell (3) (3)", 1: "cell (7)", 2: "cell (3) (9)"}
    assert labels.labels_of(categories) == {3: 0, 7: 1, 9: 2}


def test_names_of_a_checkpoint_give_the_same_map():
    labels = LabelMap.from_categories({3: "cell", 7: "cell", 9: "platelet"})
    assert LabelMap.from_names(labels.names, labels.num_classes) == labels
    gaps = LabelMap.from_names({2: "cat", 5: "dog"}, 91)
    assert gaps.labels_of({1: "dog", 2: "cat"}) == {1: 5, 2: 2}
    assert gaps.num_classes == 91


@pytest.mark.parametrize("label", [-1, 3])
def test_label_outside_of_the_classes(label):
    with pytest.raises(ValueError, match=f"class {label} is not one of 3 classes"):
        LabelMap.from_names({label: "cat"}, 3)
