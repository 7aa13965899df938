# SPDX-License-Identifier: Apache-2.0
"""Which batches ``--padding``, ``--bucket`` and ``--backend`` make of a data set."""

import json
import re
from collections import Counter

import pytest
import torch

from detr_fast import cli
from detr_fast.command_line import parse
from detr_fast.config import configure
from detr_fast.data.sampler import BucketedBatches, ShuffledBatches
from detr_fast.engine.build import begin_epoch, bucket_of, build_loader
from detr_fast.engine.datasets import build_datasets
from tests.data.layout_writers import Picture, write_coco

SIDES = [(64, 48), (48, 64), (60, 60), (80, 40)]
PICTURES = [
    Picture(f"{i}.jpg", *SIDES[i % 4], [("bear", (i, 5, 20, 20)), ("cup", (2, 30, 9, 8))])
    for i in range(12)
]
CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path):
    return write_coco(tmp_path / "data", {"train": PICTURES, "val": PICTURES[:5]})


def settings(data, flags=""):
    small = f"--data_path {data} --image_size 96 --batch_size 2 --num_workers 0 --device cpu"
    return configure(parse("", "", f"{small} {flags}".split()))


def loaded(config, epoch=0, first=0):
    [dataset] = build_datasets(config, ("train",))
    loader = build_loader(dataset, config, CPU, shuffle=True)
    begin_epoch(loader, epoch, first)
    return loader, list(map(unpacked, loader))


def unpacked(batch):
    """Images and targets, with the size of each image without its padding."""
    images, targets = batch.images, list(batch)
    whole = [list(images.tensors.shape[2:])] * len(targets)
    sizes = whole if images.sizes is None else images.sizes.tolist()
    return images, [t | {"size": size} for t, size in zip(targets, sizes, strict=True)]


def ids(batches):
    return [[int(target["image_id"]) for target in targets] for _, targets in batches]


@pytest.mark.parametrize("bucket", [16, 32])
def test_grouped_batches_have_rounded_sizes(data, bucket, capsys):
    loader, batches = loaded(settings(data, f"--bucket {bucket}"), epoch=3)
    assert isinstance(loader.batch_sampler, BucketedBatches)
    for images, _ in batches:
        height, width = images.tensors.shape[2:]
        assert images.tensors.dtype == torch.uint8
        assert (height % bucket, width % bucket) == (0, 0)
        largest = images.sizes.max(dim=0).values
        assert (largest > torch.tensor([height - bucket, width - bucket])).all()
    # the plan, said before an image was opened, is what came
    shapes = {tuple(images.tensors.shape[2:]) for images, _ in batches}
    padded = sum(images.tensors[:, 0].numel() for images, _ in batches)
    real = sum(int(images.sizes.prod(dim=1).sum()) for images, _ in batches)
    line = f"Epoch: [3]  batches have {len(shapes)} shapes and {padded / real:.2f} times the pixels"
    assert line in capsys.readouterr().out


def test_official_batches_are_padded_to_the_largest(data, capsys):
    config = settings(data, "--padding official")
    loader, batches = loaded(config, epoch=3)
    assert type(loader.batch_sampler) is ShuffledBatches
    for images, targets in batches:
        sizes = torch.tensor([target["size"] for target in targets])
        assert list(images.tensors.shape[2:]) == sizes.max(dim=0).values.tolist()
    assert "times the pixels" not in capsys.readouterr().out
    # the same images, each augmented in the same way
    _, grouped = loaded(settings(data), epoch=3)
    assert ids(grouped) != ids(batches)
    expected, found = samples(batches), samples(grouped)
    assert expected.keys() == found.keys()
    for image_id in expected:
        assert torch.equal(expected[image_id], found[image_id])


def samples(batches):
    """Images without padding by their ids."""
    return {
        int(target["image_id"]): image[:, : target["size"][0], : target["size"][1]]
        for images, targets in batches
        for image, target in zip(images.tensors, targets, strict=True)
    }


def test_an_epoch_goes_on_after_any_batch(data):
    config = settings(data)
    _, whole = loaded(config, 2)
    _, rest = loaded(config, 2, 4)
    assert ids(rest) == ids(whole)[4:]
    for (images, _), (again, _) in zip(rest, whole[4:], strict=True):
        assert torch.equal(images.tensors, again.tensors)
    seen = Counter(i for batch in ids(whole) for i in batch)
    assert set(seen.values()) == {1}
    assert len(seen) == 12


def test_evaluation_is_official_and_of_the_same_pixels(data):
    config = settings(data)
    [dataset] = build_datasets(config, ("val",))
    loader = build_loader(dataset, config, CPU, shuffle=False)
    batches = list(map(unpacked, loader))
    assert [len(targets) for _, targets in batches] == [2, 2, 1]
    assert ids(batches) == [[1, 2], [3, 4], [5]]
    assert list(batches[0][0].tensors.shape[2:]) == [128, 128]  # 96 x 128 and 128 x 96
    assert batches[0][0].tensors.dtype == torch.uint8


def test_the_reference_back_end_gets_floats(data):
    config = settings(data, "--backend reference --padding official")
    assert {images.tensors.dtype for images, _ in loaded(config)[1]} == {torch.float32}


def test_images_of_one_size_are_not_grouped(capsys):
    config = configure(parse("", "", ["--device", "cpu", "--bucket", "48"]))
    [dataset] = build_datasets(config, ("train",))
    assert bucket_of(config, dataset) == 0
    loader = build_loader(dataset, config, CPU, shuffle=True)
    begin_epoch(loader, 0, 0)
    images = next(iter(loader)).images
    assert images.tensors.shape == (32, 3, 128, 128)
    assert images.tensors.dtype == torch.uint8
    assert images.sizes is None
    assert "times the pixels" not in capsys.readouterr().out


def test_unknown_sizes_are_read_and_said(data, capsys):
    file = data / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    for image in content["images"][:7]:
        del image["width"]
    file.write_text(json.dumps(content))
    loader, _ = loaded(settings(data))
    line = "gives no size for 7 images; their headers are read (--padding official needs no sizes)"
    assert f"{file}: {line}" in capsys.readouterr().out
    sizes = [SIDES[i % 4][::-1] for i in range(12)]
    assert loader.batch_sampler.sizes.tolist() == [list(size) for size in sizes]
    loaded(settings(data, "--padding official"))
    assert "gives no size" not in capsys.readouterr().out


def test_a_run_says_its_padding_and_resumes_under_another(data, tmp_path, capfd):
    small = "--model detr_tiny --hidden_dim 32 --nheads 4 --dim_feedforward 32 --num_queries 8 "
    small += (
        f"--backbone_weights none --image_size 64 --num_workers 0 --device cpu --data_path {data} "
    )
    small += f"--output_dir {tmp_path}/out --checkpoint_steps 1 "

    def run(flags):
        assert cli.train(f"{small} {flags}".split()) == 0
        return capfd.readouterr().out

    assert len(re.findall(r"Epoch: \[\d\]  batches have \d+ shapes", run("--epochs 2"))) == 2
    printed = run("--epochs 3 --padding official --resume auto")
    assert "batches have" not in printed
    assert "Epoch: [2]" in printed
    printed = run("--epochs 4 --padding bucket --bucket 32 --resume auto")
    assert printed.count("batches have") == 1
