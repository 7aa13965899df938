# SPDX-License-Identifier: Apache-2.0
"""Data sets and batches.  Importing this package needs torch alone."""

from detr_fast.data.batch import ImageBatch, Targets, collate, pad_images

__all__ = ["ImageBatch", "Targets", "collate", "pad_images"]
