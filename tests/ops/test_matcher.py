# SPDX-License-Identifier: Apache-2.0
"""Matches of the compiled op against the reference twin, on every device."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from detr_fast import ops, reference
from detr_fast.data import Targets
from detr_fast.ops.matcher import ClassCost, CostWeights, MatchStatus
from detr_fast.reference.matcher import matching_cost, matching_cost_terms
from tests.cudasim import simulated
from tests.ops.match_cases import CLASS_COSTS, DETR, assert_same_match, random_boxes, random_case

pytest.importorskip("scipy")


def assert_equals_reference(case, *args, ties="scipy", **options):
    ours = ops.hungarian_match(*case, *args, ties=ties, **options)
    theirs = reference.hungarian_match(*case, *args, **options)
    assert_same_match(ours, theirs)
    return ours


# an image without targets; more queries than a block has threads; as many and more targets
SIZES = [((3, 0, 7), 20), ((1, 2), 150), ((9, 16, 17, 30), 16), ((40,), 3)]


@pytest.mark.parametrize("ties", ["any", "scipy"])
@pytest.mark.parametrize(("counts", "queries"), SIZES)
@pytest.mark.parametrize("class_cost", CLASS_COSTS.values(), ids=CLASS_COSTS)
def test_equals_reference(device, class_cost, counts, queries, ties):
    case = random_case(counts, queries, device=device)
    match = assert_equals_reference(case, DETR, class_cost, ties=ties)
    assert not match.status.any()


def test_logits_may_rule_out_classes(device):
    logits, boxes, targets = random_case([3, 7], 20, device=device)
    logits[:, :, ::2, 4:] = -torch.inf
    assert not assert_equals_reference((logits, boxes, targets), DETR).status.any()


@pytest.mark.parametrize("weights", [(0, 5, 2), (1, 0, 2), (1, 5, 0), (0, 0, 1), (-1, 0.3, 1e-3)])
def test_weights_may_be_zero_or_anything(device, weights):
    case = random_case([4, 2], 20, device=device)
    assert_equals_reference(case, CostWeights(*weights))


@pytest.mark.parametrize(("groups", "repeat"), [(3, 1), (1, 2), (2, 3), (4, 5)])
def test_groups_and_repeated_targets(device, groups, repeat):
    case = random_case([3, 0, 5, 1], 24, device=device)
    match = assert_equals_reference(case, DETR, groups=groups, repeat=repeat)
    # 5 targets, matched 5 times each, are more than the 6 queries of a group
    found = match.query_of_target.view(2, 4, groups, repeat, 8) >= 0
    assert found[:, 2].sum((-1, -2)).eq(min(24 // groups, 5 * repeat)).all()


def test_layers_differ_in_queries_and_columns(device):
    case, other = random_case([3, 5], 24, device=device), random_case([3, 5], 9, 1, 30, 1, device)
    layers = [[*mine, *theirs] for mine, theirs in zip(case[:2], other[:2], strict=True)]
    match = assert_equals_reference((*layers, case[2]), DETR, groups=3)
    assert match.target_of_query.shape == (3, 2, 24)
    assert match.target_of_query[2, :, 9:].eq(-1).all()


def test_more_layers_than_one_launch_takes(device):
    case = random_case([2], 6, layers=35, device=device)
    assert_equals_reference(case, DETR, groups=2)


@pytest.mark.parametrize("weights", [DETR, CostWeights(0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extra_cost_is_added(device, dtype, weights):
    case = random_case([3, 7], 20, device=device)
    extra = torch.rand(2, 2, 20, 8, generator=torch.Generator().manual_seed(1))
    extra[:, 0, :, 3:] = extra[:, 1, :, 7:] = torch.nan  # padding
    assert_equals_reference(case, weights, extra_cost=extra.to(device, dtype))


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("of_boxes", FLOATS, ids=str)
@pytest.mark.parametrize("of_logits", FLOATS, ids=str)
def test_takes_every_dtype(device, of_logits, of_boxes):
    logits, boxes, targets = random_case([3, 7], 20, device=device)
    targets = replace(targets, boxes=targets.boxes.to(of_boxes))
    case = logits.to(of_logits), boxes.to(of_boxes), targets
    match = assert_equals_reference(case, DETR)
    assert match.cost.dtype == torch.promote_types(of_logits, torch.float32)


@pytest.mark.parametrize("counts", [(), (0,), (0, 0, 0)])
def test_without_targets(device, counts):
    case = random_case(counts, 5, device=device)
    match = assert_equals_reference(case, DETR, repeat=2)
    assert all(q.shape == t.shape == (0,) for pairs in match.pairs() for q, t in pairs)


def test_without_room_for_targets(device):
    logits, boxes, targets = random_case((0, 0), 5, device=device)
    none = replace(targets, labels=targets.labels[:, :0], boxes=targets.boxes[:, :0])
    match = assert_equals_reference((logits, boxes, none), DETR, repeat=2)
    assert match.target_of_query.eq(-1).all()
    assert match.pairs()[0][0][0].shape == (0,)


def test_counts_beyond_the_padding_are_clamped(device):
    logits, boxes, targets = random_case([8, 0], 20, device=device)
    wild = replace(targets, count=torch.tensor([100, -3], dtype=torch.int32, device=device))
    ours = ops.hungarian_match(logits, boxes, wild, DETR)
    assert_close(ours.query_of_target, ops.hungarian_match(logits, boxes, targets, DETR)[0])


def test_takes_any_strides(device):
    logits, boxes, targets = random_case([3, 7], 20, device=device)
    expected = ops.hungarian_match(logits, boxes, targets, DETR)
    apart = logits.mT.contiguous().mT  # a query's logits are not side by side
    wide = torch.stack([boxes, boxes], -1).flatten(-2)[..., ::2]
    sparse = Targets(
        torch.stack([targets.labels] * 2, -1)[..., 0],
        targets.boxes.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([targets.count] * 2, -1)[..., 0],
        targets.count_host,
    )
    inputs = apart, wide, sparse.labels, sparse.boxes, sparse.count
    assert not any(t.is_contiguous() for t in inputs)
    assert_same_match(ops.hungarian_match(apart, wide, sparse, DETR), expected)
    one = [t[:1, :1].expand(2, 2, 20, -1) for t in (logits, boxes)]
    assert_equals_reference((*one, targets), DETR)


def grid_case(device, columns=3):
    """Few different costs, which floats hold exactly where only boxes count."""
    g = torch.Generator().manual_seed(5)
    logits = torch.zeros(4, 3, 24, columns)
    boxes = torch.randint(1, 4, (4, 3, 24, 4), generator=g) / 4
    counts = [6, 20, 24]
    targets = Targets.from_list(
        [
            {
                "labels": torch.zeros(n, dtype=torch.int64),
                "boxes": torch.randint(1, 4, (n, 4), generator=g) / 4,
            }
            for n in counts
        ]
    )
    return logits.to(device), boxes.to(device), targets.to(device)


@pytest.mark.parametrize("repeat", [1, 2])
def test_ties_are_resolved_as_by_scipy(device, repeat):
    case = grid_case(device)
    match = assert_equals_reference(case, DETR, repeat=repeat)
    assert_equals_reference(case, CostWeights(0, 1, 0), repeat=repeat)
    ours = ops.hungarian_match(*case, DETR, repeat=repeat)
    assert_close(ours.cost, match.cost)


@pytest.mark.parametrize("class_cost", CLASS_COSTS.values(), ids=CLASS_COSTS)
def test_equal_queries_cost_the_same_wherever_they_stand(device, class_cost):
    """Queries that have collapsed to two kinds, and targets that come twice."""
    logits, boxes, targets = random_case([12], 53, device=device)
    kind = torch.arange(53, device=device) % 5 // 4
    twice = replace(targets, labels=targets.labels % 3, boxes=targets.boxes.clone())
    twice.boxes[:, 6:12] = twice.boxes[:, :6]
    twice.labels[:, 6:12] = twice.labels[:, :6]
    assert_equals_reference((logits[:, :, kind], boxes[:, :, kind], twice), DETR, class_cost)


def single_costs(queries, dtype, device):
    """A case of one target an image, and an extra cost that leaves one query to choose."""
    images = 2 * queries
    logits, boxes, targets = random_case([1] * images, queries, 1, 92, device=device)
    extra = torch.full((1, images, queries, 8), 1e30, dtype=dtype)
    extra[0, torch.arange(images), torch.arange(images) % queries] = 0
    case = logits.to(dtype), boxes.to(dtype), targets
    return case, extra.to(device)


# the class cost alone is compared where it is no difference of two terms
COSTS = [(DETR, name) for name in CLASS_COSTS]
COSTS += [(CostWeights(1, 0, 0), name) for name in ("softmax", "iou_aware")]
COSTS += [(CostWeights(0, 5, 2), "softmax")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("weights", "name"), COSTS, ids=str)
def test_cost_is_that_of_the_eager_formula(device, weights, name, dtype):
    """Within 2 units in the last place of its largest term; exactly without exp and log."""
    case, extra = single_costs(37, dtype, device)
    class_cost = CLASS_COSTS[name]
    ours = ops.hungarian_match(*case, weights, class_cost, extra_cost=extra)
    (logits,), (boxes,), targets = case
    terms = matching_cost_terms(logits, boxes, targets.labels, targets.boxes, weights, class_cost)
    images = torch.arange(len(logits), device=device)
    picked = images, images % 37, torch.zeros_like(images)
    eager = matching_cost(terms, weights, None)[picked]
    weighted = zip(weights, terms, strict=True)
    sizes = [(w * term[picked]).abs() for w, term in weighted if term is not None]
    largest = torch.stack(sizes).amax(0)
    ulp = torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest
    most = 0 if weights.cost_class == 0 else 2 if dtype == torch.float32 else 4
    assert ((ours.cost[0, :, 0] - eager).abs() / ulp).max() <= most


def wrong_inputs():
    """What makes each term not finite: argument, index, value."""
    for value in (torch.nan, torch.inf, -torch.inf):
        if value != -torch.inf:  # a class that a softmax rules out
            yield f"logit {value}", "logits", (0, 1, 4, 2), value
        yield f"box {value}", "boxes", (1, 0, 3, 2), value
        yield f"extra {value}", "extra", (1, 1, 2, 3), value
    yield "overflow", "extra", (0, 0, 2, 1), 3.4e38
    yield "label beyond", "labels", (1, 3), 11
    yield "label below", "labels", (0, 0), -1


POLICIES = ["worst", (1.0, 3.4028234663852886e38, -3.4028234663852886e38), (0.0, 0.0, 0.0)]


@pytest.mark.parametrize("policy", POLICIES, ids=["worst", "nan_to_num", "zero"])
@pytest.mark.parametrize("wrong", [*wrong_inputs()], ids=lambda wrong: wrong[0])
def test_what_is_not_finite_is_replaced(device, wrong, policy):
    _, name, index, value = wrong
    logits, boxes, targets = random_case([3, 7], 20, device=device)
    extra = torch.zeros(2, 2, 20, 8, device=device)
    {"logits": logits, "boxes": boxes, "extra": extra, "labels": targets.labels}[name][index] = (
        value
    )
    if name == "extra":
        boxes[index[0], index[1], index[2], 0] = 1e38  # what the sum overflows by
    case = logits, boxes, targets
    match = assert_equals_reference(case, DETR, extra_cost=extra, non_finite=policy)
    assert (match.status != 0).sum() == (2 if name == "labels" else 1)
    with pytest.raises(ValueError, match=r"layer \d, image \d: "):
        match.raise_for_status()


def test_error_policy_names_the_problem_and_leaves_it_free(device):
    logits, boxes, targets = random_case([3, 7], 20, device=device)
    boxes[1, 0, 13, 2] = torch.nan
    what = "layer 1, image 0, group 1: .*cost_bbox, cost_giou"
    if device.type == "cpu":
        with pytest.raises(ValueError, match=what):
            ops.hungarian_match(logits, boxes, targets, DETR, groups=2)
    others = ops.hungarian_match(logits, boxes, targets, DETR, groups=2, non_finite="worst")
    with pytest.raises(ValueError, match=what):
        others.raise_for_status()
    match = ops.hungarian_match(logits, boxes, targets, DETR, groups=2, non_finite="status")
    query_of_target, target_of_query, cost, status = match[:4]
    no_result = MatchStatus.NO_RESULT | MatchStatus.COST_BBOX | MatchStatus.COST_GIOU
    assert status[1, 0, 1] == no_result
    with ops.use_reference():
        twin = ops.hungarian_match(logits, boxes, targets, DETR, groups=2, non_finite="status")
    assert_close(status, twin.status, rtol=0, atol=0)
    assert status.nonzero().tolist() == [[1, 0, 1]]
    assert query_of_target[1, 0, 8:].eq(-1).all()
    assert target_of_query[1, 0, 10:].eq(-1).all()
    assert cost[1, 0, 1] == 0
    query_of_target[1, 0, 8:] = others.query_of_target[1, 0, 8:]
    target_of_query[1, 0, 10:] = others.target_of_query[1, 0, 10:]
    assert_close(query_of_target, others.query_of_target)
    assert_close(target_of_query, others.target_of_query)


def test_replaced_by_infinity_may_leave_no_assignment(device):
    case = random_case([3, 7], 20, device=device)
    extra = torch.zeros(2, 2, 20, 8, device=device)
    extra[1, 1, :, 2] = torch.nan
    match = assert_equals_reference(
        case, DETR, extra_cost=extra, non_finite=(torch.inf, torch.inf, torch.inf)
    )
    with pytest.raises(ValueError, match="layer 1, image 1: no assignment has a finite cost"):
        match.raise_for_status()


@pytest.mark.parametrize("ties", ["any", "scipy"])
@pytest.mark.parametrize("counts", [(3, 30), (45, 50)])
def test_costs_beyond_the_shared_memory_go_to_the_workspace(needs_simulator, counts, ties):
    """Of all three pieces none, the targets, and the solver's state fit in."""
    case = random_case(counts, 40)
    expected = reference.hungarian_match(*case, DETR, ClassCost("focal"))
    for limit in (64, 2048, 6144):
        with simulated(schedule="random", max_shared_bytes=limit):
            match = ops.hungarian_match(*case, DETR, ClassCost("focal"), ties=ties)
        assert_same_match(match, expected)


def test_is_one_launch(needs_simulator):
    case = random_case([3, 0, 7], 20, layers=6)
    with simulated() as simulator:
        before = simulator.counts()["launches"]
        ops.hungarian_match(*case, DETR, groups=2)
        assert simulator.counts()["launches"] == before + 1


def test_more_queries_than_threads(device):
    g = torch.Generator().manual_seed(0)
    logits, boxes, targets = random_case([4], 1100, layers=1, columns=3, device=device)
    near = random_boxes(1, 1, 4, generator=g).to(device)
    boxes[:, :, -4:] = near
    match = assert_equals_reference((logits, boxes, targets), DETR)
    assert match.query_of_target.max() < 1100
