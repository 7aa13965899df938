# SPDX-License-Identifier: Apache-2.0
"""The generated default data set `shapes-v1`: pictures of four shapes with exact boxes.

A picture is a function of (seed, index) and of nothing else: every draw comes from the counter
based SplitMix64 and every pixel from integer arithmetic, so that all platforms and all
versions of numpy paint the same picture.  It is frozen: another pixel needs another name.

Each picture has 1 to 6 objects on a textured background with unlabelled clutter (lines, squiggles,
dots).  Later objects cover earlier ones, but at most `HIDDEN` of any.  A box is the tight extent of
the pixels of its object that can be seen, as in COCO: x0, y0, x1, y1, the last two exclusive.
"""

import math
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detr_fast.data.augmentation import draw_flip, fresh_seed
from detr_fast.data.sampler import Draw
from detr_fast.data.splitmix import GOLDEN, mix
from detr_fast.data.transforms import PIXELS, normalize

NAME = "shapes-v1"
SIDE = 128  # height and width of a picture
CLASS_NAMES = {0: "disc", 1: "rectangle", 2: "triangle", 3: "cross"}
LENGTHS = {"train": 2000, "val": 500}
SEEDS = {"train": 1, "val": 2}
COUNTS = (1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6)  # objects in a picture, each entry as likely
HIDDEN = (3, 10)  # at most 3/10 of an object's pixels are covered by others
# longest side of an object's own frame, in pixels: one in six is small
SMALL_SIZES = (16, 23)
SIZES = (28, 60)

_ONE = 1024  # fixed point: 1.0
_COSINES = (1024, 989, 887, 724, 512, 265, 0)  # of 0, 15, ... 90 degrees
_COSINES += tuple(-c for c in _COSINES[5::-1])  # ... 180 degrees
_COSINES += _COSINES[11:0:-1]  # ... 345 degrees
_AXIS = np.arange(SIDE)
_COLOUR_CANDIDATES = 6
_ATTEMPTS = 12

_MASK64 = (1 << 64) - 1


class _Random:
    """A stream of SplitMix64 words for one picture."""

    def __init__(self, seed: int, index: int):
        start = np.array([(seed << 32 | index) & _MASK64], dtype=np.uint64)
        self._state = mix(start * GOLDEN + GOLDEN)
        self._used = 0
        self._ahead: list[int] = []

    def words(self, count: int) -> np.ndarray:
        steps = np.arange(self._used + 1, self._used + count + 1, dtype=np.uint64)
        self._used += count
        return mix(self._state + steps * GOLDEN)

    def below(self, bound: int) -> int:
        """An integer in [0, bound)."""
        if not self._ahead:
            self._ahead = self.words(128).tolist()
        return self._ahead.pop() * bound >> 64

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both included."""
        return low + self.below(high - low + 1)

    def array(self, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
        """int64 array of integers in [low, high], for ranges under 2**31."""
        words = self.words(math.prod(shape)) >> np.uint64(32)
        scaled = (words * np.uint64(high - low + 1)) >> np.uint64(32)
        return scaled.astype(np.int64).reshape(shape) + low

    def several(self, count: int, low: int, high: int) -> np.ndarray:
        """int16 array of a few integers in [low, high]."""
        return np.array([self.between(low, high) for _ in range(count)], dtype=np.int16)


class Picture(NamedTuple):
    """One generated picture and its n objects, the covering ones last."""

    image: np.ndarray  # (SIDE, SIDE, 3) uint8
    owner: np.ndarray  # (SIDE, SIDE) int8: number of the object seen at a pixel, -1 = none
    boxes: np.ndarray  # (n, 4) int64: x0, y0, x1, y1 of the visible pixels, in pixels
    labels: np.ndarray  # (n,) int64: keys of CLASS_NAMES
    areas: np.ndarray  # (n,) int64: pixels of the object, hidden ones included


def _smooth_noise(random: _Random, cells: int) -> np.ndarray:
    """(SIDE, SIDE) int16 in [-64, 64]: random corners of a grid of cells, bilinear in between."""
    step = SIDE // cells
    weights = np.zeros((SIDE, cells + 1))
    weights[_AXIS, _AXIS // step] = step - _AXIS % step
    weights[_AXIS, _AXIS // step + 1] = _AXIS % step
    # products and sums of integers under 2**53: float64 is exact in every order of summation
    corners = random.array(-64, 64, (cells + 1, cells + 1)).astype(np.float64)
    return np.floor(weights @ corners @ weights.T / step**2).astype(np.int16)  # step is 2**k


def _background(random: _Random) -> tuple[np.ndarray, np.ndarray]:
    """Textured ground: (SIDE, SIDE, 3) int16 and its mean colour (3,)."""
    base = random.several(3, -25, 25) + np.int16(random.between(50, 120))
    coarse, fine = random.several(3, 6, 20), random.several(3, 2, 10)
    ground = _smooth_noise(random, 2 << random.below(3))[..., None] * coarse
    ground += _smooth_noise(random, 8 << random.below(3))[..., None] * fine
    ground >>= 6
    ground += base
    period, kind, strength = random.between(5, 16), random.below(4), random.between(4, 12)
    rows, columns = _AXIS[:, None], _AXIS[None, :]
    if kind == 0:  # stripes
        slope = random.between(-3, 3), random.between(1, 3)
        bands = (columns * slope[0] + rows * slope[1]) // (2 * period)
    elif kind == 1:  # checks
        bands = columns // period + rows // period
    else:
        return ground, base
    ground += ((bands & 1) * (2 * strength) - strength).astype(np.int16)[..., None]
    return ground, base


def _draw_clutter(random: _Random, canvas: np.ndarray, base: np.ndarray) -> None:
    """Lines, squiggles and dots, 1 or 2 pixels wide, painted on `canvas`."""
    for _ in range(random.between(3, 8)):
        kind, brush = random.below(3), random.between(1, 2)
        if kind == 0:  # a straight line
            start, end = random.several(4, 0, SIDE - 2).astype(int).reshape(2, 2)
            steps = int(np.abs(end - start).max()) + 1
            points = start + (end - start) * np.arange(steps + 1)[:, None] // steps
        elif kind == 1:  # a squiggle: a walk whose direction changes slowly
            turns = np.cumsum(random.array(-2, 2, (60,))) + random.below(24)
            moves = np.take(_COSINES, np.stack([turns, turns + 6], axis=1) % 24)
            points = random.several(2, 0, SIDE - 2) + np.cumsum(moves, axis=0) // _ONE
        else:  # dots
            points = random.array(0, 31, (random.between(3, 8), 2)) + random.several(
                2, 0, SIDE - 33
            )
            brush += 1
        colour = (base + random.several(3, -60, 60)).clip(0, 255)
        points = points[((points >= 0) & (points <= SIDE - brush)).all(axis=1)]
        for dy in range(brush):
            for dx in range(brush):
                canvas[points[:, 0] + dy, points[:, 1] + dx] = colour


def _shape_mask(label: int, width: int, height: int, turn: int) -> np.ndarray:
    """Tight bool mask (h, w) of a shape with the frame width x height, turned by turn * 15 degrees.

    The frame is shrunk so that the sides of its turned bounding box are at most max(width, height).
    """
    cosine, sine = _COSINES[turn % 24], _COSINES[(turn + 18) % 24]
    spans = (
        width * abs(cosine) + height * abs(sine),
        width * abs(sine) + height * abs(cosine),
    )
    longest = max(width, height)
    across, along = (side * longest * _ONE // max(spans) for side in (width, height))  # pixels
    offset = 2 * np.arange(longest + 2) - (longest + 1)  # twice the distance of pixel centres
    dy, dx = offset[:, None], offset[None, :]
    u = (cosine * dx + sine * dy) // across  # -_ONE ... _ONE inside the frame
    v = (cosine * dy - sine * dx) // along
    p, q = np.abs(u), np.abs(v)
    if label == 0:
        mask = p * p + q * q <= _ONE * _ONE
    elif label == 1:
        mask = (p <= _ONE) & (q <= _ONE)
    elif label == 2:
        mask = (q <= _ONE) & (2 * p <= v + _ONE)
    else:
        bar = _ONE * 3 // 8
        mask = (np.maximum(p, q) <= _ONE) & (np.minimum(p, q) <= bar)
    left, top, right, bottom = _extent(mask)
    return mask[top:bottom, left:right]


def _extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Corners of the tight box of a mask that is not empty."""
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _object_colour(random: _Random, others: list[np.ndarray]) -> np.ndarray:
    """Of a few colours that are bright in one channel, the one farthest from all `others`."""
    candidates = random.several(3 * _COLOUR_CANDIDATES, 20, 235).reshape(-1, 3)
    brightest = random.several(_COLOUR_CANDIDATES, 0, 2)
    candidates[np.arange(_COLOUR_CANDIDATES), brightest] = 235  # the ground is dim
    distance = np.abs(candidates[:, None] - np.array(others)).sum(axis=2).min(axis=1)
    return candidates[distance.argmax()]


def _place(
    random: _Random, mask: np.ndarray, owner: np.ndarray, areas: list[int]
) -> tuple[slice, slice] | None:
    """Rows and columns where `mask` hides too much of no earlier object; None if none is found."""
    height, width = mask.shape
    for _ in range(_ATTEMPTS):
        top, left = random.below(SIDE - height + 1), random.below(SIDE - width + 1)
        place = slice(top, top + height), slice(left, left + width)
        covered = _pixels(owner[place][mask], len(areas))
        if (
            (HIDDEN[1] - HIDDEN[0]) * np.array(areas, dtype=np.int64)
            <= HIDDEN[1] * (_pixels(owner, len(areas)) - covered)
        ).all():
            return place
    return None


def _pixels(owner: np.ndarray, objects: int) -> np.ndarray:
    """(objects,) int64: how many pixels each of the objects has in `owner`."""
    return np.bincount(owner.ravel() + 1, minlength=objects + 1)[1:]


def generate(seed: int, index: int) -> Picture:
    """Paint picture `index` of the series `seed`; both in [0, 2**32)."""
    random = _Random(seed, index)
    canvas, base = _background(random)
    _draw_clutter(random, canvas, base)

    owner = np.full((SIDE, SIDE), -1, dtype=np.int8)
    labels: list[int] = []
    areas: list[int] = []
    colours = [base]
    for _ in range(COUNTS[random.below(len(COUNTS))]):
        label, turn = random.below(len(CLASS_NAMES)), random.between(-2, 2)
        size = random.between(*(SIZES if random.below(6) else SMALL_SIZES))
        mask = _shape_mask(label, size, size * random.between(10, 16) // 16, turn)
        colour = _object_colour(random, colours)
        place = _place(random, mask, owner, areas)
        if place is None:
            continue
        height, width = mask.shape
        shade = np.arange(height)[:, None] * random.between(-24, 24) // height
        shade = shade + np.arange(width)[None, :] * random.between(-24, 24) // width
        canvas[place][mask] = (colour + shade[mask][:, None]).astype(np.int16)
        owner[place][mask] = len(labels)
        labels.append(label)
        areas.append(int(mask.sum()))
        colours.append(colour)

    grain = random.words(SIDE * SIDE * 3 // 8).astype("<u8").view(np.uint8)
    canvas += (grain.reshape(SIDE, SIDE, 3) >> 4).view(np.int8) - np.int8(8)
    return Picture(
        image=canvas.clip(0, 255).astype(np.uint8),
        owner=owner,
        boxes=np.array([_extent(owner == k) for k in range(len(labels))], dtype=np.int64),
        labels=np.array(labels, dtype=np.int64),
        areas=np.array(areas, dtype=np.int64),
    )


class ShapesDetection(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """The pictures of `shapes-v1` as a detection data set.

    A picture is painted at its first use and then kept as uint8 in memory (48 KiB each).  Loader
    workers keep copies of their own, and lose them at the end of an epoch unless they are
    persistent: painting costs about 2 ms, so that `num_workers=0` is fast after one epoch.

    Args:
        image_set (str): "train" (2,000 pictures) or "val" (500 pictures)
        augment (bool, optional): mirror half of the pictures, by the seed of the `Draw` or, for a
            plain index, by one from torch's global generator; default: only in "train"
        length (int, optional): use the first pictures only
        pixels (str): "float32", normalised, or "uint8"

    Items are `(image, target)`: image (Tensor[3, 128, 128]);
    target holds boxes (Tensor[n, 4]) float32 cxcywh in [0, 1], labels (Tensor[n]) int64,
    image_id, area (Tensor[n], of the boxes in pixels), iscrowd, orig_size and size (h, w).
    """

    class_names = CLASS_NAMES
    num_classes = max(CLASS_NAMES) + 1
    category_ids: ClassVar = {label: label for label in CLASS_NAMES}
    _normalized: ClassVar = normalize(  # of every byte in every channel
        torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    ).numpy()[:, 0]

    def __init__(
        self,
        image_set: str,
        augment: bool | None = None,
        length: int | None = None,
        pixels: str = "float32",
    ):
        if image_set not in LENGTHS:
            raise ValueError(f"image_set must be one of {sorted(LENGTHS)}, got {image_set!r}")
        most = LENGTHS[image_set]
        if length is not None and not 0 < length <= most:
            raise ValueError(f"length must be in 1..{most} for {image_set!r}, got {length}")
        if pixels not in PIXELS:
            raise ValueError(f"pixels {pixels!r}: choose {' or '.join(PIXELS)}")
        self.image_set, self.pixels = image_set, pixels
        self.augment = image_set == "train" if augment is None else augment
        self._kept: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * (length or most)

    def __len__(self) -> int:
        return len(self._kept)

    def _picture(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image (3, SIDE, SIDE) uint8, boxes (n, 4) int64 in pixels and labels (n,) int64."""
        kept = self._kept[index]
        if kept is None:
            picture = generate(SEEDS[self.image_set], range(len(self))[index])
            image = torch.from_numpy(picture.image).permute(2, 0, 1).contiguous()
            kept = image, torch.from_numpy(picture.boxes), torch.from_numpy(picture.labels)
            self._kept[index] = kept
        return kept

    def load_image(self, index: int) -> Tensor:
        """The picture as painted: (Tensor[3, 128, 128]) uint8."""
        return self._picture(index)[0]

    def index_of(self, image_id: int) -> int:
        """The index of a picture by its image id, which is the index.

        Raises:
            KeyError: no picture has this id.
        """
        if not 0 <= image_id < len(self):
            raise KeyError(f"{NAME}: no image id {image_id}")
        return image_id

    def box_counts(self) -> dict[int, int]:
        """Label to number of boxes; paints all pictures at the first use."""
        labels = torch.cat([self._picture(index)[2] for index in range(len(self))])
        counts = torch.bincount(labels, minlength=self.num_classes).tolist()
        return {label: counts[label] for label in self.class_names}

    def __getitem__(self, index: int | Draw) -> tuple[Tensor, dict[str, Tensor]]:
        flip = False
        if isinstance(index, Draw):
            index, seed = index
            flip = self.augment and draw_flip(seed)
        elif self.augment:
            flip = draw_flip(fresh_seed())
        image, corners, labels = self._picture(index)
        x0, y0, x1, y1 = corners.numpy().astype(np.float32).T / SIDE  # exact: a power of two
        if flip:
            x0, x1 = 1 - x1, 1 - x0
        width, height = x1 - x0, y1 - y0
        boxes = np.stack([(x0 + x1) / 2, (y0 + y1) / 2, width, height], axis=1)
        size = torch.tensor([SIDE, SIDE])
        target = {
            "boxes": torch.from_numpy(boxes),
            "labels": labels.clone(),
            "image_id": torch.tensor([range(len(self))[index]]),
            "area": torch.from_numpy(width * height * SIDE**2),
            "iscrowd": torch.zeros_like(labels),
            "orig_size": size,
            "size": size,
        }
        return torch.from_numpy(self._pixels(image.numpy(), flip)), target

    def _pixels(self, image: np.ndarray, flip: bool) -> np.ndarray:
        # numpy: torch would start threads for each step of this
        image = image[:, :, :: -1 if flip else 1].copy()
        if self.pixels == "uint8":
            return image
        return np.stack([table.take(c) for table, c in zip(self._normalized, image, strict=True)])

    @cached_property
    def ground_truth(self) -> dict[str, Any]:
        """The annotations as a COCO dict; paints all pictures at the first use."""
        images, annotations = [], []
        for index in range(len(self)):
            file_name = f"{NAME}-{self.image_set}-{index:06}.png"
            images.append({"id": index, "width": SIDE, "height": SIDE, "file_name": file_name})
            _, corners, labels = self._picture(index)
            for (x0, y0, x1, y1), label in zip(corners.tolist(), labels.tolist(), strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": label,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": label, "name": name} for label, name in self.class_names.items()]
        return {
            "info": {"description": NAME},
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
