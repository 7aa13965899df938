# SPDX-License-Identifier: Apache-2.0
"""Which label a model uses for which category of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

_OFFICIAL = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, "
    "fire hydrant, -, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, "
    "elephant, bear, zebra, giraffe, -, backpack, umbrella, -, -, handbag, tie, suitcase, "
    "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, -, wine glass, cup, fork, knife, spoon, bowl, banana, "
    "apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, "
    "potted plant, bed, -, dining table, -, -, toilet, -, tv, laptop, mouse, remote, keyboard, "
    "cell phone, microwave, oven, toaster, sink, refrigerator, -, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush"
)
# the 80 categories of COCO 2017 by their ids, 1 to 90 with ten gaps
COCO_CATEGORIES = {i: name for i, name in enumerate(_OFFICIAL.split(", "), 1) if name != "-"}
COCO_NUM_CLASSES = 91


@dataclass(frozen=True)
class LabelMap:
    """The labels of a model: small integers, each with the name of its class.

    A model knows labels, a file knows category ids, and names connect the two: the same classes
    may have other ids in another file.

    Attributes:
        names (dict[int, str]): label to name, each name once
        num_classes (int): size of the classifier without "no object"; more than every label
    """

    names: dict[int, str]
    num_classes: int

    @classmethod
    def from_categories(cls, categories: Mapping[int, str]) -> LabelMap:
        """Labels for the categories (id to name) of a training set.

        They count from 0 in the order of the ids. Official COCO alone keeps its ids as labels and
        91 classes, as DETR's published weights have them.
        """
        if categories == COCO_CATEGORIES:
            return cls(dict(COCO_CATEGORIES), COCO_NUM_CLASSES)
        named = distinct(categories)
        return cls(dict(enumerate(named[i] for i in sorted(named))), len(named))

    @classmethod
    def from_names(cls, names: Mapping[int, str], num_classes: int) -> LabelMap:
        """The labels that a checkpoint brings.

        Raises:
            ValueError: a label that ``num_classes`` does not cover.
        """
        if outside := [label for label in names if not 0 <= label < num_classes]:
            raise ValueError(f"class {outside[0]} is not one of {num_classes} classes")
        return cls(distinct(names), num_classes)

    def labels_of(self, categories: Mapping[int, str]) -> dict[int, int]:
        """Category id to label, for those of a file's categories (id to name) that have one."""
        label_of = {name: label for label, name in self.names.items()}
        named = distinct(categories)
        return {i: label_of[name] for i, name in named.items() if name in label_of}

    def category_ids_of(self, categories: Mapping[int, str]) -> dict[int, int]:
        """Label to category id, for the labels that a file's categories (id to name) name."""
        return {label: i for i, label in self.labels_of(categories).items()}


def distinct(names: Mapping[int, str]) -> dict[int, str]:
    """Names by id, with the id added to those that are not unique."""
    named = dict(names)
    while len(repeated := {n for n, count in Counter(named.values()).items() if count > 1}):
        # again, for "cell (3)" may be the name of yet another one
        named = {i: f"{name} ({i})" if name in repeated else name for i, name in named.items()}
    return named
