# SPDX-License-Identifier: Apache-2.0
"""Image sizes as COCO has them.

The shares of the most frequent ones, counted in 741 images of COCO (train2017, val2017, val2014),
make 70 % of the images. The others have a long side of 640 pixels (in one of five 500), and an
aspect of 1.05 to 1.9 around 1.4; 30 % of them are upright.
"""

import numpy as np

# per mille of images, by height and width
FREQUENT = {
    (480, 640): 205,
    (427, 640): 117,
    (640, 480): 77,
    (375, 500): 45,
    (426, 640): 43,
    (640, 427): 32,
    (428, 640): 27,
    (640, 426): 23,
    (425, 640): 22,
    (612, 612): 18,
    (500, 375): 16,
    (424, 640): 13,
    (360, 640): 12,
    (478, 640): 12,
    (333, 500): 11,
    (640, 640): 9,
    (500, 333): 9,
    (640, 425): 8,
}


def coco_like_sizes(count: int, seed: int = 0) -> np.ndarray:
    """Height and width of images (int64[count, 2]), drawn by the shares of COCO."""
    generator = np.random.default_rng(seed)
    frequent = np.array(list(FREQUENT))
    shares = np.array(list(FREQUENT.values())) / 1000
    long = np.where(generator.random(count) < 0.2, 500, 640)
    short = (long / generator.normal(1.4, 0.2, count).clip(1.05, 1.9)).astype(int)
    upright = generator.random(count) < 0.3
    sizes = np.where(upright[:, None], np.stack([long, short], 1), np.stack([short, long], 1))
    known = generator.random(count) < shares.sum()
    sizes[known] = frequent[generator.choice(len(frequent), known.sum(), p=shares / shares.sum())]
    return sizes
