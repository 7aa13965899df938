# SPDX-License-Identifier: Apache-2.0
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from detr_fast.data.coco import CocoAnnotations, CocoDetection, DatasetError
from detr_fast.data.sampler import Draw
from detr_fast.data.transforms import train_transforms
from tests.data.coco_folder import as_read, edited, write_folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path)


@pytest.fixture
def dataset(folder):
    return CocoDetection(folder, folder / "boxes.json", as_read)


def break_image(folder, name, how):
    if how == "missing":
        (folder / name).unlink()
    elif how == "truncated":
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    else:
        Image.new("RGB", (7, 7)).save(folder / name)


BROKEN = {
    "missing": ("is missing", "images whose file is missing"),
    "truncated": ("cannot be decoded (", "images that cannot be decoded"),
    "small": (
        "has 7 x 7 pixels, not 10 x 10",
        "images of another size than the annotations say",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_unusable_image_is_replaced_by_the_next_one(folder, capsys, how):
    dataset = CocoDetection(folder, folder / "boxes.json", as_read, unusable="replace")
    assert dataset.unusable_report().lines() == []
    break_image(folder, "two.png", how)
    for _ in range(2):
        image, target = dataset[0]
        assert int(target["image_id"]) == int(image[0, 0, 0]) == 5
    why, kind = BROKEN[how]
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {folder}/two.png: image 2 (two.png) {why}")
    assert said.endswith("; it is replaced by the next one\n")
    assert said.count("\n") == 1  # once for two accesses
    assert dataset.unusable_report().lines() == [
        f"{folder}/boxes.json: 1 {kind} (replaced by the next one): image 2 (two.png)"
    ]
    assert dataset.fault(0)[0] == kind
    assert dataset.fault(0)[1].startswith(f"image 2 (two.png) {why}")
    assert dataset.fault(1) is None
    with pytest.raises(DatasetError, match="image id 2 "):
        dataset.load_image(0)


def test_the_image_in_its_place_is_augmented_for_its_own_size(folder):
    """The plan of the draw was made for the image that cannot be used."""
    whole = CocoDetection(folder, folder / "boxes.json", train_transforms(160))
    break_image(folder, "two.png", "missing")
    dataset = CocoDetection(
        folder, folder / "boxes.json", train_transforms(160), unusable="replace"
    )
    for seed in range(12):
        image, target = dataset[Draw(0, seed)]
        expected, _ = whole[Draw(1, seed)]
        assert torch.equal(image, expected)
        assert target["size"].tolist() == list(image.shape[1:])


def test_sizes_that_the_annotations_do_not_give_are_read(folder):
    content = edited(lambda c: [image.pop("width") for image in c["images"][:2]])
    dataset = CocoDetection(folder, CocoAnnotations.from_dict(content), as_read)
    assert dataset.unknown_sizes.tolist() == [True, False, True]
    assert dataset.image_sizes().tolist() == [[10, 10], [8, 16], [20, 30]]
    (folder / "two.png").write_bytes(b"")
    assert dataset.image_sizes().tolist() == [[480, 640], [8, 16], [20, 30]]


def test_last_image_is_replaced_by_the_first_usable_one(folder):
    dataset = CocoDetection(folder, folder / "boxes.json", as_read, unusable="replace")
    break_image(folder, "nine.png", "missing")
    break_image(folder, "two.png", "truncated")
    assert [int(dataset[i][1]["image_id"]) for i in (0, 1, 2, -1)] == [5, 5, 5, 5]
    assert len(dataset.unusable_report()) == 2
    break_image(folder, "five.png", "missing")
    with pytest.raises(DatasetError, match=r"none of the 3 images that .*boxes\.json lists can be"):
        dataset[2]


def test_unusable_image_is_skipped(folder, capsys):
    dataset = CocoDetection(folder, folder / "boxes.json", as_read, unusable="skip")
    break_image(folder, "five.png", "missing")
    assert [dataset[i] is None for i in (0, 1, 1, 2)] == [False, True, True, False]
    assert capsys.readouterr().err.endswith("image 5 (five.png) is missing; it is left out\n")
    assert dataset.unusable_report().lines() == [
        f"{folder}/boxes.json: 1 images whose file is missing (left out): image 5 (five.png)"
    ]


def test_image_of_another_size_is_an_error_by_default(folder, dataset):
    break_image(folder, "two.png", "small")
    with pytest.raises(DatasetError, match="image id 2 has 7 x 7 pixels, not 10 x 10; restore"):
        dataset[0]


def test_there_is_an_end_to_the_images(dataset):
    with pytest.raises(IndexError):
        dataset[3]
    assert len(list(dataset)) == 3


def test_image_of_unknown_size_may_have_any(folder):
    content = edited(lambda c: c["images"][1].update(height=0, width=None))
    dataset = CocoDetection(folder, CocoAnnotations.from_dict(content), as_read)
    break_image(folder, "two.png", "small")
    assert dataset[0][0].shape == (7, 7, 3)
    content["images"][1].update(height=8)  # a known side counts
    dataset = CocoDetection(folder, CocoAnnotations.from_dict(content), as_read)
    with pytest.raises(DatasetError, match="not 0 x 8"):
        dataset[0]


def test_workers_tell_what_they_found(folder, capfd):
    dataset = CocoDetection(folder, folder / "boxes.json", as_read, unusable="skip")
    break_image(folder, "two.png", "missing")
    for _ in range(2):  # each epoch has workers of its own
        loader = DataLoader(dataset, num_workers=2, collate_fn=list)
        assert [batch[0] is None for batch in loader] == [True, False, False]
    assert dataset.unusable_report().counts == {"images whose file is missing (left out)": 1}
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1


def test_spawned_workers_share_what_they_found(folder):
    dataset = CocoDetection(folder, folder / "boxes.json", as_read, unusable="skip")
    of_worker = pickle.loads(ForkingPickler.dumps(dataset))  # as a spawned process receives it
    break_image(folder, "two.png", "missing")
    assert of_worker[0] is None
    assert len(dataset.unusable_report()) == 1


@pytest.mark.parametrize(
    ("orientation", "annotated", "found"),
    [
        (6, (6, 4), (6, 4)),  # annotated upright
        (6, (4, 6), (4, 6)),  # annotated as stored
        (6, (0, 0), (4, 6)),  # nobody knows: as stored, as the original reads it
        (1, (6, 4), None),
        (None, (6, 4), None),
        (6, (6, 5), None),
    ],
)
def test_picture_that_its_camera_turned(tmp_path, orientation, annotated, found):
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[:2] = 255
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": annotated[0], "width": annotated[1]}],
        "annotations": [],
        "categories": [{"id": 1}],
    }
    dataset = CocoDetection(tmp_path, CocoAnnotations.from_dict(content), as_read)
    if found is None:
        assert dataset.fault(0) == (
            "images of another size than the annotations say",
            f"image 1 (a.png) has 6 x 4 pixels, not {annotated[1]} x {annotated[0]}",
        )
        return
    assert dataset.fault(0) is None
    image, target = dataset[0]
    assert tuple(image.shape[:2]) == tuple(target["orig_size"].tolist()) == found
    # 6: to be turned by 90 degrees clockwise, which brings the upper half to the right
    bright = image[:, 2:] if found == (6, 4) else image[:2]
    assert bright.min() == 255
    assert image.sum() == pixels.sum()
    assert torch.equal(dataset.load_image(0).permute(1, 2, 0), image)
