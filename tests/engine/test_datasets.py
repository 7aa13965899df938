# SPDX-License-Identifier: Apache-2.0
"""Which label of a checkpoint stands for which category of the data to evaluate."""

import argparse

import pytest
import torch

from detr_fast.config import Config, UsageError
from detr_fast.data.labels import COCO_CATEGORIES
from detr_fast.engine.datasets import labels_of_checkpoint

CONFIG = Config(resume="x.pth", dataset_file="coco")


def bare(classes, **entries):
    """What of published weights tells their classes."""
    weights = {
        "class_embed.weight": torch.zeros(classes + 1, 8),
        "query_embed.weight": torch.zeros(5, 8),
        "backbone.0.body.layer3.5.conv1.weight": torch.zeros(1, 1),
        "transformer.decoder.layers.0.linear1.weight": torch.zeros(16, 8),
    }
    return {"model": weights, **entries}


def labels(checkpoint, categories, used=None):
    used = set(categories) if used is None else used
    return labels_of_checkpoint(CONFIG, checkpoint, categories, used)


def test_published_weights_know_official_coco_by_its_ids():
    found = labels(bare(91), COCO_CATEGORIES)
    assert found.labels_of(COCO_CATEGORIES) == {i: i for i in COCO_CATEGORIES}
    assert found.num_classes == 91


@pytest.mark.parametrize("args", [None, argparse.Namespace(dataset_file="coco")])
def test_published_weights_know_renumbered_coco_classes_by_name(args, capsys):
    data = {1: "bear", 2: "cup", 3: "apple"}
    checkpoint = bare(91, args=args) if args else bare(91)
    assert labels(checkpoint, data).labels_of(data) == {1: 23, 2: 47, 3: 53}
    assert "warning" not in capsys.readouterr().out


def test_labels_without_names_are_category_ids(capsys):
    """The original's convention for own data, whether the head has 91 classes or fewer."""
    data = {0: "none", 1: "RBC", 2: "WBC"}
    for classes in (91, 3):
        found = labels(bare(classes), data, used={1, 2})
        assert found.labels_of(data) == {0: 0, 1: 1, 2: 2}
        assert "names no classes: its labels are taken as category ids" in capsys.readouterr().out
    with pytest.raises(UsageError, match="trained for 2 classes, the data have category ids up to"):
        labels(bare(2), data)
    assert labels(bare(2), data, used={1}).names == {0: "none", 1: "RBC"}


def test_names_of_the_checkpoint_decide():
    checkpoint = bare(3, class_names={0: "RBC", 1: "WBC", 2: "Platelets"})
    data = {5: "WBC", 9: "Platelets", 7: "unused"}
    assert labels(checkpoint, data, used={5, 9}).labels_of(data) == {5: 1, 9: 2}
    with pytest.raises(UsageError, match="knows RBC, WBC, Platelets; the data have unused: eval"):
        labels(checkpoint, data)


def test_names_are_safe_to_print():
    checkpoint = bare(1, class_names={0: "\x1b[31mred\n"})
    assert labels(checkpoint, {0: "\\x1b[31mred\\n"}).names == {0: "\\x1b[31mred\\n"}
