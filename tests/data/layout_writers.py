# SPDX-License-Identifier: Apache-2.0
"""Writes one data set in each layout that the package reads."""

import json
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image


class Picture(NamedTuple):
    name: str
    width: int
    height: int
    objects: list[tuple[str, tuple[float, float, float, float]]]  # class and x, y, width, height


NAMES = ["apple", "bear", "cup"]
DATA = {
    "train": [
        Picture("a.png", 40, 30, [("bear", (1, 2, 10, 20)), ("apple", (0.5, 3, 7.5, 8.5))]),
        Picture("b.jpg", 33, 57, []),
        Picture("c 1.x.jpg", 31, 17, [("cup", (4 + i / 2, 1.5, 3, 2 + i)) for i in range(12)]),
    ],
    "val": [
        Picture("v1.jpg", 20, 64, [("cup", (0, 0, 20, 64))]),
        Picture("v2.jpg", 65, 23, [("apple", (60, 20, 5, 3)), ("cup", (7.5, 0, 1, 22.5))]),
    ],
}


def write_images(folder, pictures, from_folder=None):
    """Noise of the right size, or links to the files of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for picture in pictures:
        file = folder / picture.name
        if from_folder is not None:
            file.symlink_to(Path(from_folder).resolve() / picture.name)
        else:
            pixels = random.integers(0, 256, (picture.height, picture.width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)


def coco_json(pictures, names=NAMES, dummy=False):
    """Category ids count from 1; Roboflow's dummy has id 0."""
    ids = {name: number for number, name in enumerate(names, 1)}
    images, annotations = [], []
    for image_id, picture in enumerate(pictures, 1):
        size = {"width": picture.width, "height": picture.height}
        images.append({"id": image_id, "file_name": picture.name, **size})
        for name, box in picture.objects:
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[name]}
            annotations.append({**entry, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    if dummy:
        categories = [{**category, "supercategory": "things"} for category in categories]
        categories.insert(0, {"id": 0, "name": "things", "supercategory": "none"})
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root, data=DATA, names=NAMES, from_folder=None):
    (root / "annotations").mkdir(parents=True)
    for split, pictures in data.items():
        write_images(root / f"{split}2017", pictures, from_folder)
        file = root / "annotations" / f"instances_{split}2017.json"
        file.write_text(json.dumps(coco_json(pictures, names)))
    return root


def write_roboflow(root, data=DATA, names=NAMES, from_folder=None):
    for split, pictures in data.items():
        folder = root / {"train": "train", "val": "valid"}[split]
        write_images(folder, pictures, from_folder)
        content = coco_json(pictures, names, dummy=True)
        (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def yolo_line(picture, name, box, names, number=repr):
    x, y, w, h = box
    shares = (x + w / 2) / picture.width, (y + h / 2) / picture.height
    shares += w / picture.width, h / picture.height
    return " ".join([str(names.index(name)), *map(number, shares)])


def write_yolo(
    root, data=DATA, names=NAMES, from_folder=None, number=repr, folders="{what}/{split}"
):
    for split, pictures in data.items():
        write_images(root / folders.format(what="images", split=split), pictures, from_folder)
        labels = root / folders.format(what="labels", split=split)
        labels.mkdir(parents=True)
        for picture in pictures:
            lines = [yolo_line(picture, *thing, names, number) for thing in picture.objects]
            if lines:
                stem = picture.name.rpartition(".")[0]
                (labels / f"{stem}.txt").write_text("\n".join(lines) + "\n")
    entries = {split: folders.format(what="images", split=split) for split in data}
    lines = [f"{split}: {entry}" for split, entry in entries.items()]
    lines += [f"nc: {len(names)}", f"names: {json.dumps(names)}"]
    (root / "data.yaml").write_text("\n".join(lines) + "\n")
    return root


def voc_xml(picture, first=1, size=True, difficult=()):
    """``first`` is what pixels are counted from; ``difficult`` holds numbers of objects."""
    root = ElementTree.Element("annotation")

    def add(parent, tag, text=None):
        child = ElementTree.SubElement(parent, tag)
        child.text = None if text is None else str(text)
        return child

    add(root, "folder", "JPEGImages")
    add(root, "filename", picture.name)
    if size:
        entry = add(root, "size")
        for tag, number in (("width", picture.width), ("height", picture.height), ("depth", 3)):
            add(entry, tag, number)
    for at, (name, (x, y, w, h)) in enumerate(picture.objects):
        thing = add(root, "object")
        add(thing, "name", name)
        add(thing, "pose", "Unspecified")
        add(thing, "difficult", int(at in difficult))
        box = add(thing, "bndbox")
        corners = {"xmin": x + first, "ymin": y + first, "xmax": x + w, "ymax": y + h}
        for tag, number in corners.items():
            add(box, tag, number)
    return ElementTree.tostring(root, encoding="unicode")


def write_voc(root, data=DATA, from_folder=None, **options):
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, pictures in data.items():
        write_images(root / "JPEGImages", pictures, from_folder)
        stems = [picture.name.rpartition(".")[0] for picture in pictures]
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(stems) + "\n")
        for stem, picture in zip(stems, pictures, strict=True):
            (root / f"Annotations/{stem}.xml").write_text(voc_xml(picture, **options))
    return root


def write_voc_side_by_side(root, data=DATA, from_folder=None, **options):
    for split, pictures in data.items():
        folder = root / {"train": "train", "val": "valid"}[split]
        write_images(folder, pictures, from_folder)
        for picture in pictures:
            stem = picture.name.rpartition(".")[0]
            (folder / f"{stem}.xml").write_text(voc_xml(picture, **options))
    return root
