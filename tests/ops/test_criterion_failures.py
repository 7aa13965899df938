# SPDX-License-Identifier: Apache-2.0
"""Layers whose match failed or whose targets are wrong: their losses are NaN, nothing raises."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from detr_fast import ops
from detr_fast.ops.matcher import Match
from detr_fast.reference.match import MatchSizes, MatchStatus
from tests.ops.loss_cases import (
    CROSS_ENTROPY,
    KINDS,
    LossCase,
    assert_equals_reference,
    loss_case,
    run,
)
from tests.ops.match_cases import DETR, random_case


def poison(case, where):
    """Make layer 1 of a case of (3, 4) targets wrong; layer 0 stays as it was."""
    match, labels = case.match.clone(), case.targets.labels.clone()
    status = torch.zeros(2, 2, 1, dtype=torch.int32, device=match.device)
    columns = case.logits.shape[-1]
    if where == "failed":
        match[1, 1] = -1
        status[1, 1, 0] = MatchStatus.COST_GIOU | MatchStatus.NO_RESULT
    elif where == "target beyond":
        match[1, 0, 2] = 3  # the padding has room for it
    elif where == "target far beyond":
        match[1, 0, 2] = 2**40
    else:
        labels[0, 1] = {
            "label far beyond": 2**40,
            "label beyond": columns,
            "label below": -1,
            "no-object": columns - 1,
        }[where]
        match[0, 0][match[0, 0] == 1] = -1
    query_of_target = torch.empty(0, device=match.device)
    sizes = MatchSizes(None, (match.shape[-1],) * 2, 1, 1)
    of_match = Match(query_of_target, match, query_of_target, status, case.targets.count, sizes)
    return case._replace(match=of_match, targets=replace(case.targets, labels=labels))


WRONG = ["failed", "target beyond", "target far beyond"]
WRONG += ["label beyond", "label far beyond", "label below", "no-object"]


@pytest.mark.parametrize("where", WRONG)
@KINDS
def test_a_layer_that_is_wrong_is_nan_and_no_other(device, class_loss, where):
    if where == "no-object" and class_loss is not CROSS_ENTROPY:
        pytest.skip("the last column of a sigmoid is a class")
    case = poison(loss_case((3, 4), 9, class_loss=class_loss, device=device), where)
    ours = assert_equals_reference(case)
    assert ours.losses[1, :3].isnan().all()
    assert ours.losses[:, 3:].isfinite().all()
    assert ours.logits[1].isnan().all()
    matched = case.match.target_of_query[1] >= 0
    assert ours.boxes[1][matched].isnan().any()
    alone = [x[:1] for x in case[:2]]
    fine = case._replace(logits=alone[0], boxes=alone[1], match=case.match.target_of_query[:1])
    assert_close(ours.losses[0], run(ops.set_loss, fine).losses[0], rtol=0, atol=0)
    for gradient in (ours.logits[0], ours.boxes[0]):
        assert gradient.isfinite().all()


def test_a_match_of_nan_boxes_has_failed(device):
    logits, boxes, targets = random_case([3, 0, 4], 9, device=device)
    boxes[1, 2, 5, 2] = torch.nan
    match = ops.hungarian_match(logits, boxes, targets, DETR, non_finite="status")
    assert match.status.nonzero().tolist() == [[1, 2, 0]]
    ours = assert_equals_reference(LossCase(logits, boxes, targets, match, {}))
    assert ours.losses[1, :3].isnan().all()
    assert ours.losses[0].isfinite().all()


def test_one_group_without_a_result_is_a_failure(device):
    """Or its queries would be trained as no-object, beside a group that is matched."""
    logits, boxes, targets = random_case([3, 2], 8, device=device)
    boxes[1, 0, 6, 1] = torch.nan  # of the second group
    match = ops.hungarian_match(logits, boxes, targets, DETR, groups=2, non_finite="status")
    failed = (match.status & int(MatchStatus.NO_RESULT)).nonzero()
    assert failed.tolist() == [[1, 0, 1]]
    ours = assert_equals_reference(LossCase(logits, boxes, targets, match, {}))
    assert ours.losses[1, :3].isnan().all()
    assert ours.losses[0].isfinite().all()


def test_a_status_that_had_a_remedy_is_no_failure(device):
    """Replaced costs are matched, and an image without targets has nothing to match."""
    logits, boxes, targets = random_case([3, 0], 9, device=device)
    logits[0, 0, 3, 2] = torch.inf
    match = ops.hungarian_match(logits, boxes, targets, DETR, non_finite="worst")
    assert match.status[0, 0, 0] != 0
    match.status[1, 1, 0] = MatchStatus.COST_CLASS
    logits[0, 0, 3, 2] = 5
    ours = assert_equals_reference(LossCase(logits, boxes, targets, match, {}))
    assert ours.losses.isfinite().all()
