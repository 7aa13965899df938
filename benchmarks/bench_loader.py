# SPDX-License-Identifier: Apache-2.0
"""From image files to a batch: one worker of the loader, decoding alone, and what a batch costs.

``original`` is the loader of facebookresearch/detr: pillow decodes, resizes and mirrors, the worker
normalises to floats, and a batch has a list of targets.  The images are JPEG files of COCO's common
size, made here, and those of coco125 where the folder of real data is.  They are in the page cache.
One worker is one thread: its images a second times ``--num_workers`` are what a loader gives.
"""

import functools
import os
import pickle
import tempfile
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from torchvision.transforms.v2 import functional

from benchmarks.harness import Case, Contender, Missing, Setup, on_cpu
from detr_fast.data.batch import collate
from detr_fast.data.cache import ImageCache
from detr_fast.data.images import read_image
from detr_fast.data.packed import PackedBatch, PackedCollate
from detr_fast.data.transforms import normalize, resized_size

BATCH, SHORT_SIDE, LONGEST = 8, 640, 1333
SIZES = [(480, 640), (427, 640), (640, 480), (424, 640)]  # the most frequent of COCO
MEAN_BOXES = 7
Files = list[tuple[Path, tuple[int, int]]]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Work of processors alone: on any device the same."""
    sources = {"made": made_files}
    if coco125() is not None:
        sources["coco125"] = coco_files
    found = []
    for name, files in sources.items():
        floors = on_cpu(device, {"pillow": 1.1})
        build = functools.partial(decoding, files)
        found.append(Case(f"decode, {name}", build, check=rounding, floors=floors, images=BATCH))
        floors = on_cpu(device, {"original": 2.0})
        build = functools.partial(loading, files)
        found.append(Case(f"load, {name}", build, check=rounding, floors=floors, images=BATCH))
    floors = on_cpu(device, {"list of targets": 10.0})
    found.append(Case("message, 16 images", messages, floors=floors, images=16))
    return found[-1:] if quick else found


def test_loader(case, bench):
    bench(case)


def rounding(actual: Any, expected: Any) -> None:
    """Bytes of two libraries: the same within rounding, a step of 1 for all but few pixels."""
    for ours, theirs in zip(actual, expected, strict=True):
        difference = (ours.float() - theirs.float()).abs()
        assert_close(difference.mean().item(), 0.0, atol=0.05, rtol=0)
        assert difference.max() <= 2, f"pixels differ by {difference.max()}"


def coco125() -> Path | None:
    """The images of coco125; None where there is no folder of real data."""
    root = Path(__file__).resolve().parents[1]
    data = os.environ.get("DETR_FAST_TEST_DATA") or root.parent / "shared" / "data"
    folder = Path(data) / "coco125" / "train2017"
    return folder if folder.is_dir() else None


def coco_files() -> Files:
    """The first images of coco125."""
    paths = sorted(coco125().iterdir())[:BATCH]
    return [(path, Image.open(path).size[::-1]) for path in paths]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="bench_loader")


def made_files() -> Files:
    """JPEG files of COCO's sizes, 0.1 to 0.2 MB each: blurred noise is as rich as a photo."""
    files = []
    for number in range(BATCH):
        height, width = SIZES[number % len(SIZES)]
        path = Path(_folder().name) / f"{number}.jpg"
        noise = np.random.default_rng(number).integers(0, 256, (height // 4, width // 4, 3))
        image = Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.BICUBIC)
        image.save(path, quality=90)
        files.append((path, (height, width)))
    return files


def pillow(path: Path) -> Image.Image:
    """As the original opens an image."""
    return Image.open(path).convert("RGB")


def decoding(files: Callable[[], Files]) -> Setup:
    """Files to pixels."""
    listed = files()

    def ours() -> list[Tensor]:
        return [read_image(path, size) for path, size in listed]

    def theirs() -> list[Tensor]:
        return [
            torch.from_numpy(np.array(pillow(path))).permute(2, 0, 1).contiguous()
            for path, _ in listed
        ]

    return Setup(theirs, {"detr_fast": Contender(ours), "pillow": Contender(theirs)})


def targets_of(number: int) -> dict[str, Tensor]:
    """What a data set tells of an image."""
    count = MEAN_BOXES - 3 + number % 7
    return {
        "boxes": torch.full((count, 4), 0.5),
        "labels": torch.arange(count),
        "image_id": torch.tensor([number]),
        "area": torch.ones(count),
        "iscrowd": torch.zeros(count, dtype=torch.int64),
        "orig_size": torch.tensor([480, 640]),
        "size": torch.tensor([640, 853]),
    }


def loading(files: Callable[[], Files]) -> Setup:
    """Files to a padded batch: decode, resize, mirror every second image, collate."""
    listed = files()
    cache = ImageCache(np.array([size for _, size in listed]))
    for index, (path, size) in enumerate(listed):
        cache.put(index, read_image(path, size))
    pack = PackedCollate(collate)

    def samples(read: Callable[[int], Any], finish: Callable[[Any], Tensor]) -> list[Any]:
        found = []
        for index, (_, (height, width)) in enumerate(listed):
            image = read(index)
            if index % 2:
                image = functional.horizontal_flip(image)
            image = functional.resize(image, list(resized_size(height, width, SHORT_SIDE, LONGEST)))
            found.append((finish(image), targets_of(index)))
        return found

    def original() -> Any:
        return collate(
            samples(
                lambda index: pillow(listed[index][0]),
                lambda image: normalize(functional.pil_to_tensor(image)),
            )
        )

    def fast(read: Callable[[int], Tensor]) -> PackedBatch:
        return pack(samples(read, lambda image: image))

    def in_bytes(batch: Any) -> list[Tensor]:
        """Pixels of each image without its padding."""
        images, _ = batch
        mean, std = normalize(torch.zeros(3, 1, 1)), normalize(torch.ones(3, 1, 1))
        pixels = (images.tensors - mean) / (std - mean) * 255
        return [p[:, :h, :w] for p, (h, w) in zip(pixels, images.sizes.tolist(), strict=True)]

    def in_bytes_of(batch: PackedBatch) -> list[Tensor]:
        sizes = batch.images.sizes.tolist()
        return [p[:, :h, :w] for p, (h, w) in zip(batch.pixels, sizes, strict=True)]

    decode = functools.partial(fast, lambda index: read_image(*listed[index]))
    kept = functools.partial(fast, cache.get)
    return Setup(
        lambda: in_bytes(original()),
        {
            "detr_fast": Contender(decode, lambda: in_bytes_of(decode())),
            "with --cache ram": Contender(kept, lambda: in_bytes_of(kept())),
            "original": Contender(original, lambda: in_bytes(original())),
        },
    )


def messages() -> Setup:
    """What both processes do to hand over the targets of a batch, whose images are small here."""
    samples = [(torch.zeros(3, 2, 2, dtype=torch.uint8), targets_of(i)) for i in range(16)]
    packed, listed = PackedCollate(collate)(samples), collate(samples)

    def sent(batch: Any) -> Any:
        return pickle.loads(ForkingPickler.dumps(batch))

    def contents(targets: Any) -> Any:
        return [{name: target[name] for name in ("labels", "boxes")} for target in targets]

    return Setup(
        lambda: contents(listed[1]),
        {
            "detr_fast": Contender(lambda: sent(packed), lambda: contents(sent(packed))),
            "list of targets": Contender(lambda: sent(listed), lambda: contents(sent(listed)[1]))
            if hasattr(os, "fork")
            else Missing("tensors do not travel by descriptors here"),
        },
    )
