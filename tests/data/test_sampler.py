# SPDX-License-Identifier: Apache-2.0
"""Order and augmentation follow from seed and epoch, whatever the workers and wherever begun."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from detr_fast.data.sampler import Draw, SeededSamples, ShuffledBatches


class Noise(Dataset):
    """Item ``i`` is ``i`` and two random numbers."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return torch.cat([torch.tensor([float(index)]), torch.rand(1), torch.rand(1)])


def passes(batches, *begins):
    seen = []
    for begin in begins:
        batches.begin(*begin)
        seen.append(list(batches))
    return seen


def test_an_epoch_has_full_batches_of_different_images():
    [batches] = passes(ShuffledBatches(11, 3, seed=1), (0,))
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert len({draw.index for batch in batches for draw in batch}) == 9
    assert len({draw.seed for batch in batches for draw in batch}) == 9
    assert len(ShuffledBatches(11, 3, seed=1)) == 3


def test_order_follows_from_seed_and_epoch():
    first, second, again = passes(ShuffledBatches(11, 3, seed=1), (0,), (1,), (0,))
    assert first == again
    assert first != second
    assert passes(ShuffledBatches(11, 3, seed=2), (0,))[0] != first
    # the seeds of neighbours are not the same numbers shifted
    assert passes(ShuffledBatches(11, 3, seed=0), (1,))[0] != first


def test_a_pass_begins_anywhere():
    whole, rest = passes(ShuffledBatches(11, 3, seed=1), (4,), (4, 2))
    assert rest == whole[2:]
    assert passes(ShuffledBatches(11, 3, seed=1), (4, 3)) == [[]]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_samples_do_not_depend_on_workers(workers):
    def batches(workers, first):
        order = ShuffledBatches(11, 2, seed=3)
        loader = DataLoader(
            SeededSamples(Noise()),
            batch_sampler=order,
            num_workers=workers,
            generator=torch.Generator(),
        )
        order.begin(5, first)
        return torch.stack(list(loader))

    torch.manual_seed(workers)  # the state around it does not matter, nor does it change
    before = torch.get_rng_state()
    assert torch.equal(batches(workers, 2), batches(0, 0)[2:])
    assert torch.equal(torch.get_rng_state(), before)


def test_random_numbers_come_back_after_an_error():
    class Broken(Noise):
        def __getitem__(self, index):
            torch.rand(1)
            raise KeyError(index)

    before = torch.get_rng_state()
    with pytest.raises(KeyError, match="4"):
        SeededSamples(Broken())[Draw(4, 7)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(SeededSamples(Broken())) == 11
