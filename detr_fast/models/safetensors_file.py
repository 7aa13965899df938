# SPDX-License-Identifier: Apache-2.0
"""Weights in a safetensors file, with what a checkpoint says beside them in its metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from detr_fast.atomic_file import write_whole

ENTRY = "detr_fast"  # of the metadata: JSON of the entries beside the weights
BESIDE = ("model_config", "class_names", "category_ids")
BY_LABEL = ("class_names", "category_ids")  # dicts whose keys are int, which JSON has not


def read_safetensors(path: Path) -> dict[str, Any]:
    """Read a file onto the CPU.

    Args:
        path (Path): the file.

    Returns:
        dict: ``"model"`` (dict[str, Tensor]), and the entries of the metadata.

    Raises:
        ValueError: if it is no such file, or its metadata are not what is written here.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ValueError('needs safetensors: pip install "detr-fast[train]"') from error
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"no safetensors file, or damaged ({error})") from error
    return {"model": state} | _entries(metadata.get(ENTRY, "{}"))


def _entries(text: str) -> dict[str, Any]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata {ENTRY!r} are no JSON ({error})") from error
    if not isinstance(entries, dict) or not set(entries) <= set(BESIDE):
        raise ValueError(f"its metadata {ENTRY!r} hold other entries than {', '.join(BESIDE)}")
    for name in BY_LABEL:
        if name in entries:
            try:
                entries[name] = {int(label): value for label, value in entries[name].items()}
            except (AttributeError, ValueError) as error:
                raise ValueError(f"its {name} are no dict by label") from error
    return entries


def write_safetensors(
    state: Mapping[str, Tensor], entries: Mapping[str, Any], path: Path, **metadata: str
) -> None:
    """Write a file, whole or not at all.

    Args:
        state (Mapping[str, Tensor]): the weights.
        entries (Mapping): of `BESIDE`; others are left out.
        path (Path): the file, in an existing folder.
        **metadata (str): more of it.
    """
    from safetensors.torch import save

    kept = {name: entries[name] for name in BESIDE if entries.get(name) is not None}
    if kept:
        metadata[ENTRY] = json.dumps(kept)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_whole(path, save(tensors, metadata or None))
