# SPDX-License-Identifier: Apache-2.0
"""What to look at when a training does not take off."""

from collections.abc import Mapping
from typing import Any

from detr_fast.config import Config

PATIENCE = 5  # epochs without AP before anything is said, then said again as often
NOTHING = 0.001  # AP50 that counts as none


def why_no_ap(record: Mapping[str, Any], steps: int, config: Config) -> str:
    """Say what keeps AP at 0, judging by the validation losses of an epoch.

    Args:
        record (Mapping): of ``log.txt``.
        steps (int): updates so far.
        config (Config): the flags of the run.

    Returns:
        str: some lines; empty while there is an AP, and in the first epochs of a long run.
    """
    epoch = record["epoch"] + 1
    ap50 = record["test_coco_eval_bbox"][1]
    due = epoch % PATIENCE == 0 or epoch == config.epochs
    if ap50 > NOTHING or not due:
        return ""
    class_error = record["test_class_error"]
    giou = 1 - record["test_loss_giou_unscaled"]
    lines = [f"AP50 is {max(ap50, 0):.3f} after {epoch} epochs, {steps} updates. Validation shows:"]
    lines.append(f"- class error {class_error:.0f} % of the matched queries")
    if class_error > 95:
        lines[-1] += (
            ": no class is learned; compare the class names above with the data (--check_data), "
            "and evaluate against the same classes"
        )
    lines.append(f"- GIoU {giou:.2f} between matched boxes")
    if giou < 0.2:
        lines[-1] += (
            ": no place is learned; boxes of a COCO-format file are [x, y, width, height] in "
            "pixels, not corners and not shares of the image; see the picture in --output_dir"
        )
    if steps < 2000 and not (config.finetune or config.resume):
        lines.append(
            f"- {steps} updates: a DETR from random weights needs many thousands; start from "
            "trained weights with --finetune, or go on"
        )
    start, end = record.get("train_loss", 0.0), record["test_loss"]
    if end > 2 * start > 0:
        lines.append(f"- loss {end:.2f}, in training {start:.2f}: too few images, or --lr too high")
    lines.append(f"- learning rate {record['train_lr']:g}: try a tenth of it, and ten times it")
    return "\n".join(lines)
