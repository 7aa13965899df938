# SPDX-License-Identifier: Apache-2.0
"""Weights for other classes and queries: what fits is loaded, the rest keeps its start."""

import pytest
import torch

from detr_fast.models import detr_tiny
from detr_fast.models.checkpoint import CheckpointError
from detr_fast.models.finetune import load_fitting_weights

PETS = {0: "cat", 1: "dog", 2: "fish"}


def models(classes, **changes):
    """A model of three classes, whose weights a checkpoint holds, and one that gets them."""
    torch.manual_seed(0)
    return detr_tiny(num_classes=3), detr_tiny(num_classes=classes, **changes)


def load(earlier, model, names, earlier_names=PETS):
    start = {key: value.clone() for key, value in model.state_dict().items()}
    said = load_fitting_weights(model, {"model": earlier.state_dict()}, names, earlier_names)
    return said, start, model.state_dict(), earlier.state_dict()


def same(state, other, *but):
    return all(torch.equal(v, other[k]) for k, v in state.items() if k not in but)


HEAD = ("class_embed.weight", "class_embed.bias")


def test_same_classes_load_whole():
    said, _, state, stored = load(*models(3), PETS)
    assert said == []
    assert same(state, stored)
    said, *_ = load(*models(3), PETS, None)  # no names to compare: the size decides
    assert said == []


def test_another_head_starts_anew():
    names = {0: "RBC", 1: "WBC"}
    said, start, state, stored = load(*models(2), names)
    assert said == [
        "class head: the checkpoint has 3 classes (cat, dog, fish), the data have 2 classes "
        "(RBC, WBC): it starts anew"
    ]
    assert same(state, stored, *HEAD)
    assert all(torch.equal(state[key], start[key]) for key in HEAD)


def test_known_names_keep_their_rows():
    names = {0: "bird", 1: "fish", 2: "cat", 3: "cow"}
    said, start, state, stored = load(*models(4), names)
    assert said[0].endswith("it starts anew; 2 of them known by name are kept")
    for key in HEAD:
        expected = [start[key][0], stored[key][2], stored[key][0], start[key][3], stored[key][3]]
        assert torch.equal(state[key], torch.stack(expected))
    assert same(state, stored, *HEAD)


def test_equal_size_with_other_names_is_not_the_same_head():
    said, start, state, _ = load(*models(3), {0: "a", 1: "b", 2: "c"})
    assert "it starts anew" in said[0]
    assert torch.equal(state["class_embed.weight"], start["class_embed.weight"])


def test_another_number_of_queries_starts_anew():
    said, start, state, stored = load(*models(3, num_queries=50), PETS)
    assert said == ["queries: the checkpoint has 16, the model 50: they start anew"]
    assert torch.equal(state["query_embed.weight"], start["query_embed.weight"])
    assert same(state, stored, "query_embed.weight")


def test_anything_else_that_does_not_fit_is_an_error():
    earlier, model = models(2, dim_feedforward=64)
    with pytest.raises(CheckpointError, match=r"of another shape \(transformer\.decoder"):
        load_fitting_weights(model, earlier.state_dict(), PETS, PETS)
    with pytest.raises(CheckpointError, match="missing"):
        load_fitting_weights(model, {"model": {"x": torch.zeros(1)}}, PETS, None)
