# SPDX-License-Identifier: Apache-2.0
"""Data sets and batches.  Importing this package needs torch alone."""

from detr_fast.data.batch import ImageBatch, collate, pad_images
from detr_fast.matcher.packing import Targets

__all__ = ["ImageBatch", "Targets", "collate", "pad_images"]
