# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.padding``: what padding training batches have, planned, without images.

With ``--annotations FILE`` the images are those of a COCO file, else 118,287 with COCO's sizes.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from detr_fast.data.annotations import CocoAnnotations
from detr_fast.data.sampler import BucketedBatches
from tests.data.coco_sizes import coco_like_sizes

TRAIN2017 = 118_287  # images


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.padding", description=__doc__)
    parser.add_argument("--annotations", type=Path, help="a COCO file that gives image sizes")
    parser.add_argument("--epochs", type=int, default=3, help="to average over")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--buckets", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--short_side", type=int, default=800)
    given = parser.parse_args(arguments)
    if given.annotations:
        sizes = CocoAnnotations.read(given.annotations).sizes
    else:
        sizes = coco_like_sizes(TRAIN2017)
    print(f"{len(sizes)} images, mean of {given.epochs} epochs")
    print("batch  bucket  at random  grouped  shapes of an epoch  s to plan it")
    for batch_size in given.batch_sizes:
        for bucket in given.buckets:
            batches = BucketedBatches(sizes, batch_size, 0, given.short_side, bucket)
            plans, began = [], time.perf_counter()
            for epoch in range(given.epochs):
                batches.begin(epoch)
                plans.append(batches.padding())
            seconds = (time.perf_counter() - began) / given.epochs
            shapes, grouped, at_random = np.mean(plans, axis=0)
            print(
                f"{batch_size:5d}  {bucket:6d}  {at_random:9.2f}  {grouped:7.2f}  "
                f"{shapes:18.0f}  {seconds:12.2f}"
            )


if __name__ == "__main__":
    main()
