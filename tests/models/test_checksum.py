# SPDX-License-Identifier: Apache-2.0
"""Damage of any entry is found by its digest."""

import argparse

import pytest
import torch

from detr_fast.models.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from detr_fast.models.checksum import damaged_entries, with_digests


def content():
    return {
        "model": {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)},
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "plain": [1, 2.5, "x", None, True, (3, {"k": -0.0})],
    }


def test_what_was_signed_is_undamaged_after_a_file(tmp_path):
    write_checkpoint(with_digests(content()), tmp_path / "x.pth")
    assert damaged_entries(read_checkpoint(tmp_path / "x.pth")) == []
    again = with_digests(with_digests(content()))
    assert again["sha256"].keys() == content().keys()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model", lambda c: c["model"]["w"].view(torch.int32)[1, 2].bitwise_xor_(1)),
        ("model", lambda c: c["model"].update(w=c["model"]["w"].reshape(3, 2))),
        ("model", lambda c: c["model"].update(w=c["model"]["w"].view(torch.int32))),
        ("model", lambda c: c["model"].pop("n")),
        ("half", lambda c: c["half"].mul_(2)),
        ("plain", lambda c: c["plain"].__setitem__(0, True)),
        ("plain", lambda c: c["plain"].__setitem__(5, [3, {"k": -0.0}])),
        ("plain", lambda c: c["plain"][5][1].update(k=0.0)),
        ("plain", lambda c: c.update(plain=argparse.Namespace())),
    ],
)
def test_every_change_is_found(name, damage):
    signed = with_digests(content())
    damage(signed)
    assert damaged_entries(signed) == [name]


def test_entries_may_be_taken_out_and_added():
    signed = with_digests(content())
    del signed["half"]
    signed["note"] = "mine"
    assert damaged_entries(signed) == []
    assert damaged_entries(content()) == []
    assert damaged_entries({**content(), "sha256": "of a stranger"}) == []


def test_only_plain_values_are_signed():
    with pytest.raises(TypeError, match="tensors and plain values, not Namespace"):
        with_digests({"args": argparse.Namespace()})


def test_a_flipped_bit_in_a_file_is_named(tmp_path):
    path = tmp_path / "x.pth"
    write_checkpoint(with_digests({"model": {"w": torch.full((1000,), 7.0)}}), path)
    data = bytearray(path.read_bytes())
    at = data.index(torch.full((8,), 7.0).numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.pth: damaged: the checksum of model does not"):
        read_checkpoint(path)
