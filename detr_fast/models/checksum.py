# SPDX-License-Identifier: Apache-2.0
"""Digests of a checkpoint's entries, which tell a damaged file from a good one.

torch's own format does not notice a flipped bit in a tensor.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KEY = "sha256"


def with_digests(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checkpoint with the SHA-256 of each entry under ``sha256``.

    Args:
        checkpoint (Mapping): tensors and plain values in dicts, lists and tuples.

    Raises:
        TypeError: if it holds anything else.
    """
    entries = {name: value for name, value in checkpoint.items() if name != KEY}
    return {**entries, KEY: {name: _digest(value) for name, value in entries.items()}}


def damaged_entries(checkpoint: Mapping[str, Any]) -> list[str]:
    """Names of the entries that differ from their digest; those without one are not looked at.

    An entry may be taken out or added without harm to the others.
    """
    digests = checkpoint.get(KEY)
    if not isinstance(digests, Mapping):
        return []
    present = [name for name in digests if name in checkpoint]
    return [name for name in present if not _agrees(checkpoint[name], digests[name])]


def _agrees(value: Any, digest: Any) -> bool:
    try:
        return _digest(value) == digest
    except Exception:  # sparse or meta tensors, lists within themselves: never had our digest
        return False


def _digest(value: Any) -> str:
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        sha.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        data = value.detach().cpu().contiguous().reshape(-1)
        sha.update(memoryview(data.view(torch.uint8).numpy()))
    elif isinstance(value, Mapping):
        sha.update(f"dict {len(value)}".encode())
        for key, entry in value.items():
            _feed(sha, key)
            _feed(sha, entry)
    elif isinstance(value, list | tuple):
        sha.update(f"{type(value).__name__} {len(value)}".encode())
        for entry in value:
            _feed(sha, entry)
    elif value is None or isinstance(value, bool | int | float | str):
        text = repr(value).encode()
        sha.update(f"{type(value).__name__} {len(text)} ".encode())
        sha.update(text)
    else:
        raise TypeError(f"a checkpoint holds tensors and plain values, not {type(value).__name__}")
