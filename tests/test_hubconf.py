# SPDX-License-Identifier: Apache-2.0
"""torch.hub finds the entry points of the original."""

import inspect
import runpy

import pytest
import torch

from detr_fast.models import PostProcess
from tests.conftest import ROOT

DETECTION = ["detr_resnet50", "detr_resnet50_dc5", "detr_resnet101", "detr_resnet101_dc5"]
PANOPTIC = ["detr_resnet50_panoptic", "detr_resnet50_dc5_panoptic", "detr_resnet101_panoptic"]


def test_lists_the_entry_points_of_the_original():
    entry_points = runpy.run_path(str(ROOT / "hubconf.py"))
    public = {n for n, v in entry_points.items() if callable(v) and not n.startswith("_")}
    assert public == {*DETECTION, *PANOPTIC, "detr_tiny"} == set(entry_points["__all__"])


@pytest.mark.parametrize("name", DETECTION)
def test_arguments_are_those_of_the_original(name):
    import detr_fast.models

    parameters = inspect.signature(getattr(detr_fast.models, name)).parameters.values()
    defaults = {p.name: p.default for p in parameters}
    assert defaults == {"pretrained": False, "num_classes": 91, "return_postprocessor": False}


def test_loads_a_model_and_its_postprocessor():
    model, postprocess = torch.hub.load(
        str(ROOT), "detr_resnet50", source="local", num_classes=5, return_postprocessor=True
    )
    assert model.class_embed.out_features == 6
    assert isinstance(postprocess, PostProcess)


@pytest.mark.parametrize("name", PANOPTIC)
def test_panoptic_models_are_refused(name):
    with pytest.raises(NotImplementedError, match="panoptic heads are not in this version"):
        torch.hub.load(str(ROOT), name, source="local")
