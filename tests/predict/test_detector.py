# SPDX-License-Identifier: Apache-2.0
"""Detections are those of the evaluation, whatever the images come as."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import detr_fast
from detr_fast.config import UsageError
from detr_fast.data.images import UnusableImage
from detr_fast.models.checkpoint import CheckpointError
from detr_fast.predict.attention import AttentionMaps
from tests.predict.conftest import NAMES


@pytest.fixture(scope="module")
def detector(checkpoint):
    return detr_fast.Detector.from_checkpoint(checkpoint, device="cpu")


def same(one, other, **tolerance):
    np.testing.assert_array_equal(one.class_id, other.class_id)
    assert_close(one.xyxy, other.xyxy, **tolerance)
    assert_close(one.confidence, other.confidence, **tolerance)


def test_a_detection_has_its_fields(detector, scene):
    found = detector.predict(scene, threshold=0.0)
    assert len(found) == detector.model.config.num_queries
    assert found.xyxy.dtype == found.confidence.dtype == np.float32
    assert found.class_id.dtype == np.int64
    assert found.size == (60, 90)
    assert (np.diff(found.confidence) <= 0).all()
    assert found.data["class_name"].tolist() == [NAMES[label] for label in found.class_id]
    assert found.to_dicts()[0]["name"] == NAMES[int(found.class_id[0])]


def test_the_threshold_keeps_the_best(detector, scene):
    everything = detector.predict(scene, threshold=0.0)
    middle = float(np.median(everything.confidence))
    some = detector.predict(scene, threshold=middle)
    assert 0 < len(some) < len(everything)
    assert some.confidence.min() >= middle
    np.testing.assert_array_equal(some.xyxy, everything.xyxy[: len(some)])
    nothing = detector.predict(scene, threshold=1.0)
    assert len(nothing) == 0
    assert nothing.xyxy.shape == (0, 4)
    assert nothing.to_coco(1) == nothing.to_dicts() == []


def test_boxes_are_in_pixels_of_the_image(detector, scene):
    """Twice as large an image has the same boxes, twice as large: it is resized to the same."""
    large = np.asarray(Image.fromarray(scene).resize((180, 120), Image.Resampling.NEAREST))
    one, other = (detector.predict(image, 0.0) for image in (scene, large))
    ratio = other.xyxy[:3] / one.xyxy[:3]
    assert np.median(ratio) == pytest.approx(2, abs=0.1)


def test_one_image_or_several(detector, scene, tmp_path):
    Image.fromarray(scene).save(path := tmp_path / "a.png")
    one = detector.predict(scene, 0.0)
    assert one.source == "image"
    same(detector.predict(path, 0.0), one)
    listed = detector.predict([scene, str(path), torch.from_numpy(scene).permute(2, 0, 1)], 0.0)
    assert [found.source for found in listed] == ["0", str(path), "2"]
    for found in listed:
        same(found, one)
    assert isinstance(detector.predict(tmp_path, 0.0), list)


def test_a_batch_of_one_size_is_its_images(detector, scene):
    images = [scene, scene[:, ::-1], scene[::-1], scene // 2, 255 - scene]
    alone = detector.predict(images, 0.0)
    for batch_size in (2, 5, 7):
        for one, other in zip(
            alone, detector.predict(images, 0.0, batch_size=batch_size), strict=True
        ):
            assert_close(one.confidence, other.confidence, rtol=0, atol=1e-4)


def test_what_cannot_be_used_is_named(detector, dirty_folder, scene):
    with pytest.warns(UserWarning, match=r"corrupt\.jpg cannot be decoded .*left out"):
        found = detector.predict(dirty_folder, 0.0)
    by_name = {each.source.rsplit("/", 1)[1]: each for each in found}
    sizes = {name: each.size for name, each in by_name.items()}
    assert sizes == {
        "plain.png": (60, 90),
        "cmyk.jpg": (60, 90),
        "grey.png": (60, 90),
        "sixteen.png": (60, 90),
        "pixel.png": (1, 1),
        "turned.png": (60, 90),
    }
    same(by_name["turned.png"], by_name["plain.png"])  # boxes are in the upright image
    same(by_name["sixteen.png"], detector.predict(scene[..., 0], 0.0))
    with pytest.raises(UnusableImage, match=r"corrupt\.jpg cannot be decoded"):
        detector.predict(dirty_folder / "corrupt.jpg")


def test_supervision_takes_them(detector, scene):
    supervision = pytest.importorskip("supervision")
    found = detector.predict(scene, 0.0).to_supervision()
    assert isinstance(found, supervision.Detections)
    drawn = supervision.BoxAnnotator().annotate(scene.copy(), found)
    assert (drawn != scene).any()
    assert set(found["class_name"]) <= set(NAMES.values())


def test_attention_maps_are_those_of_the_layer(detector, scene):
    """Against torch's own module with the same weights; of a padded batch, too."""
    images = [scene, scene[:40]]
    model = detector.model
    layer = model.transformer.decoder.layers[-1].multihead_attn
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    memories = []
    other = model.transformer.encoder.register_forward_hook(
        lambda module, inputs, memory: memories.append((memory, inputs[1]))
    )
    found = detector.predict(images, 0.0, batch_size=2, attention=True)
    hook.remove()
    other.remove()
    (query, _, padding), (memory, position) = seen[0], memories[0]
    original = torch.nn.MultiheadAttention(layer.embed_dim, layer.num_heads, batch_first=True)
    original.load_state_dict(layer.state_dict())
    mask = None if padding is None else padding.cells
    with torch.no_grad():
        _, expected = original(query, memory + position, memory, key_padding_mask=mask)
    for place, each in enumerate(found):
        maps = each.data["attention"]
        assert_close(maps.sum((1, 2)), np.ones(len(each), np.float32), rtol=0, atol=1e-5)
        rows = expected[place].amax(1).sort().values
        assert_close(torch.from_numpy(maps).flatten(1).amax(1).sort().values, rows)
    assert found[0].data["attention"].shape[1:] != found[1].data["attention"].shape[1:]


def test_hooks_are_gone_afterwards(detector, scene):
    before = detector.predict(scene, 0.0)
    detector.predict(scene, 0.0, attention=True)
    layer = detector.model.transformer.decoder.layers[-1].multihead_attn
    assert not layer._forward_pre_hooks
    assert not detector.model.input_proj._forward_hooks
    same(detector.predict(scene, 0.0), before)
    assert AttentionMaps(detector.model)._inputs == ()


def test_maps_of_a_compiled_model_are_refused(checkpoint, scene):
    detector = detr_fast.Detector.from_checkpoint(checkpoint, device="cpu", compile="on")
    with pytest.raises(UsageError, match="attention maps need a model that is not compiled"):
        detector.predict(scene, attention=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"threshold": 1.5}, "threshold 1.5: a score"), ({"batch_size": 0}, "expected at least 1")],
)
def test_options_out_of_range(detector, scene, options, message):
    with pytest.raises(UsageError, match=message):
        detector.predict(scene, **options)


def test_the_callers_random_numbers_stay(checkpoint, scene):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    detr_fast.Detector.from_checkpoint(checkpoint).predict(scene)
    assert torch.equal(torch.rand(3), expected)


def test_a_file_without_a_model(tmp_path):
    torch.save({"weights": torch.zeros(3)}, path := tmp_path / "other.pth")
    with pytest.raises(CheckpointError):
        detr_fast.Detector.from_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such file"):
        detr_fast.Detector.from_checkpoint(tmp_path / "nowhere.pth")


def test_names_of_published_models_are_fetched(monkeypatch):
    asked = []

    def fetch(source):
        asked.append(source)
        raise CheckpointError("no network")

    monkeypatch.setattr("detr_fast.predict.detector.read_checkpoint", fetch)
    with pytest.raises(CheckpointError, match="no network"):
        detr_fast.Detector.from_checkpoint("detr_resnet50_dc5")
    assert asked[0].endswith("/detr-r50-dc5-f0fb7ef5.pth")


def test_importing_the_package_imports_no_detector():
    code = "import sys, detr_fast; print('detr_fast.predict' in sys.modules, 'PIL' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert printed.split() == [b"False", b"False"]


def test_dicts_are_plain(detector, scene):
    assert json.loads(json.dumps(detector.predict(scene, 0.0).to_dicts()))
