# SPDX-License-Identifier: Apache-2.0
"""Order and augmentation follow from seed and epoch, whatever the workers and wherever begun."""

from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from detr_fast.data.augmentation import draw
from detr_fast.data.sampler import BucketedBatches, ShuffledBatches, round_up
from tests.data.coco_sizes import coco_like_sizes

SIZES = coco_like_sizes(101)


def shuffled(batch_size=3, seed=1, **options):
    return ShuffledBatches(len(SIZES), batch_size, seed, **options)


def bucketed(batch_size=3, seed=1, **options):
    return BucketedBatches(SIZES, batch_size, seed, 800, window=8, **options)


both = pytest.mark.parametrize("make", [shuffled, bucketed])


class Seeds(Dataset):
    """Item ``Draw(i, seed)`` is ``i`` and the seed."""

    def __len__(self):
        return len(SIZES)

    def __getitem__(self, draw):
        return torch.tensor(draw)


def passes(batches, *begins):
    seen = []
    for begin in begins:
        batches.begin(*begin)
        seen.append(list(batches))
    return seen


@both
def test_an_epoch_has_full_batches_of_different_images(make):
    [batches] = passes(make(), (0,))
    assert [len(batch) for batch in batches] == [3] * 33
    assert len({draw.index for batch in batches for draw in batch}) == 99
    assert len({draw.seed for batch in batches for draw in batch}) == 99
    assert len(make()) == 33


def test_grouping_changes_neither_images_nor_their_augmentation():
    for epoch in range(3):
        [one], [other] = passes(shuffled(), (epoch,)), passes(bucketed(), (epoch,))
        assert one != other
        assert sorted(chain(*one)) == sorted(chain(*other))


@both
def test_order_follows_from_seed_and_epoch(make):
    first, second, again = passes(make(), (0,), (1,), (0,))
    assert first == again
    assert first != second
    assert passes(make(seed=2), (0,))[0] != first
    # the seeds of neighbours are not the same numbers shifted
    assert passes(make(seed=0), (1,))[0] != first


@both
def test_a_pass_begins_anywhere(make):
    whole, rest = passes(make(), (4,), (4, 2))
    assert rest == whole[2:]
    assert passes(make(), (4, 33)) == [[]]


@both
@pytest.mark.parametrize("workers", [0, 2])
def test_samples_do_not_depend_on_workers(make, workers):
    def batches(workers, first):
        order = make()
        loader = DataLoader(
            Seeds(), batch_sampler=order, num_workers=workers, generator=torch.Generator()
        )
        order.begin(5, first)
        return torch.stack(list(loader))

    assert torch.equal(batches(workers, 2), batches(0, 0)[2:])


@both
@pytest.mark.parametrize("replicas", [2, 4])
def test_processes_share_out_the_batches_of_one(make, replicas):
    [alone] = passes(make(batch_size=4), (2,))
    ranks = [
        passes(make(batch_size=4 // replicas, rank=rank, replicas=replicas), (2,))[0]
        for rank in range(replicas)
    ]
    assert {len(batches) for batches in ranks} == {len(alone)}
    for batch, *shares in zip(alone, *ranks, strict=True):
        assert list(chain(*shares)) == batch
    resumed = passes(make(batch_size=4 // replicas, rank=1, replicas=replicas), (2, 7))[0]
    assert resumed == ranks[1][7:]


def test_a_rank_out_of_range_is_refused():
    with pytest.raises(ValueError, match="rank 2 of 2 replicas: expected 0 to 1"):
        shuffled(rank=2, replicas=2)


def shapes_of(batches):
    """Height and width of the largest of each batch, drawn anew from what the workers get."""
    sizes = [
        draw(np.array([d.seed for d in batch]), SIZES[[d.index for d in batch]]).size
        for batch in batches
    ]
    return np.array([s.max(axis=0) for s in sizes]), sum(s.prod(axis=1).sum() for s in sizes)


def test_the_report_is_that_of_the_batches():
    for replicas in (1, 2):
        ranks = [bucketed(batch_size=2, rank=r, replicas=replicas) for r in range(replicas)]
        batches = list(chain(*(passes(one, (6,))[0] for one in ranks)))
        shapes, real = shapes_of(batches)
        shapes = round_up(shapes, 64)
        padding = ranks[-1].padding()
        assert padding == ranks[0].padding()
        assert padding.shapes == len({tuple(shape) for shape in shapes.tolist()})
        assert padding.waste == pytest.approx(2 * shapes.prod(axis=1).sum() / real)
    unpadded, real = shapes_of(passes(shuffled(batch_size=2), (6,))[0])
    one = bucketed(batch_size=2)
    one.begin(6)
    assert one.padding().at_random == pytest.approx(2 * unpadded.prod(axis=1).sum() / real)


@pytest.mark.parametrize(
    ("batch_size", "multiple", "most_waste", "least_at_random", "most_shapes"),
    [(4, 64, 1.13, 1.45, 120), (16, 64, 1.14, 1.95, 110), (16, 128, 1.22, 1.95, 45)],
)
def test_grouping_saves_padding(batch_size, multiple, most_waste, least_at_random, most_shapes):
    """Over 20,000 images of COCO's sizes; figures in docs/data.md."""
    batches = BucketedBatches(coco_like_sizes(20_000), batch_size, 0, 800, multiple)
    padding = batches.padding()
    assert padding.waste < most_waste
    assert padding.at_random > least_at_random
    assert padding.shapes <= most_shapes


def test_batches_come_in_a_random_order():
    """Neither ascending sizes nor those of one window after the other."""
    batches = BucketedBatches(SIZES, 2, 1, 800, window=50)
    shapes, _ = shapes_of(passes(batches, (0,))[0])
    pixels = shapes.prod(axis=1)
    assert abs(np.corrcoef(pixels[1:], pixels[:-1])[0, 1]) < 0.5
    within = np.abs(np.diff(np.sort(pixels))).mean()
    assert np.abs(np.diff(pixels)).mean() > 5 * within


def test_fewer_images_than_a_batch():
    batches = BucketedBatches(SIZES[:3], 4, 0, 800)
    assert len(batches) == 0
    assert list(batches) == []
