# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: read without running what is in them, written whole or not at all."""

import argparse
import os
import pickle
import re
import urllib.error
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from detr_fast.models.checkpoint_entries import CheckpointError, validated
from detr_fast.models.checksum import damaged_entries
from detr_fast.models.model_config import ModelConfig
from detr_fast.models.safetensors_file import read_safetensors

SHOWN = 5  # keys named in full in a message
FIELDS = {field.name for field in fields(ModelConfig)}


def read_checkpoint(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Only tensors, plain containers and ``argparse.Namespace`` (of the original's ``args``) are
    taken; nothing that the file brings along is executed (``torch.load`` with ``weights_only``).

    Args:
        source (str | PathLike): a path or an ``https://`` address. A download is kept in torch
            hub's folder; where its file name ends in ``-<hash>.pth``, the SHA-256 must match.

    Returns:
        dict: what was saved.

    Raises:
        CheckpointError: if there is no such file, or it is no checkpoint, or not a safe one.
    """
    source = os.fspath(source)
    address = re.match(r"(\w+)://", source)
    if address is None:
        return _load(Path(source))
    if address[1] != "https":
        raise CheckpointError(f"{source}: checkpoints are fetched by https:// only")
    return _load(_download(source))


def _download(url: str) -> Path:
    name = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = re.search(r"-([a-f0-9]+)\.", name)
    try:
        torch.hub.download_url_to_file(url, str(path), digest and digest[1])
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise CheckpointError(
            f"{url}: download failed ({error}). Fetch the file elsewhere and save it as {path}"
        ) from error
    return path


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file: check the path")
    if path.suffix == ".safetensors":
        try:
            return validated(read_safetensors(path), str(path))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can fail in any line of the reader
        raise CheckpointError(f"{path}: {_why_unreadable(path, error)}") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f"{path}: expected a dict with the key 'model' or a state dict, "
            f"found a {type(checkpoint).__name__}: save model.state_dict()"
        )
    checkpoint = validated(checkpoint, str(path))
    if damaged := damaged_entries(checkpoint):
        raise CheckpointError(
            f"{path}: damaged: the checksum of {', '.join(damaged)} does not match: take a copy of "
            "it or an earlier checkpoint (if you changed it on purpose, delete its entry 'sha256')"
        )
    return checkpoint


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "no permission to read the file"
    with path.open("rb") as file:
        start = file.read(40)
    if not start:
        return "the file is empty: copy or download it again"
    if not start.startswith((b"PK", b"\x80")):  # torch's archives, and pickles before them
        return f"no checkpoint: it starts with {start!r}; copy or download it again"
    refused = re.search(r"GLOBAL ([\w.]+)|Unsupported operand (\d+)", str(error))
    if refused:
        held = refused[1] or f"pickle instruction {refused[2]}"
        return (
            f"refused, nothing of it was run: it holds {held}, and only tensors, plain "
            "containers and argparse.Namespace are safe to read. If you trust its author, load it "
            "with torch.load(path, weights_only=False) and save its state dict anew"
        )
    # torch's text on a broken pickle recommends to load it unsafely
    known = not isinstance(error, pickle.UnpicklingError) and str(error).strip()
    reason = f" ({known.splitlines()[0]})" if known else ""
    return f"not a checkpoint of tensors, or damaged{reason}: copy or download it again"


def write_checkpoint(
    checkpoint: Mapping[str, Any], path: str | os.PathLike[str], keep: int = 1
) -> None:
    """Write a checkpoint so that ``path`` holds the old file or the new one, never a part.

    Args:
        checkpoint (Mapping): what ``torch.save`` takes; for `read_checkpoint` to read it,
            tensors and plain containers.
        path (str | PathLike): the file, in an existing folder.
        keep (int): how many generations are kept, the new one included; see
            `generation`.

    Raises:
        OSError: if the disk is full or the folder cannot be written; the old files stay.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        for age in range(keep - 1, 1, -1):
            if generation(path, age - 1).exists():
                os.replace(generation(path, age - 1), generation(path, age))
        if keep > 1 and path.exists():
            _keep_as(generation(path, 1), path)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _keep_as(older: Path, path: Path) -> None:
    """Give the file a second name, so that it is there until the new one takes its place."""
    older.unlink(missing_ok=True)
    try:
        os.link(path, older)
    except OSError:  # a file system without hard links
        os.replace(path, older)


def generation(path: Path, age: int) -> Path:
    """The name of an earlier checkpoint: ``x.pth``, ``x_previous.pth``, ``x_previous_2.pth``..."""
    suffix = ("", "_previous")[age] if age < 2 else f"_previous_{age}"
    return path.with_name(f"{path.stem}{suffix}{path.suffix}")


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def weights_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint: under ``model``, under ``state_dict``, or bare.

    The ``module.`` of ``DistributedDataParallel`` is taken off.
    """
    state = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError("found no state dict: expected it under 'model', or by itself")
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights into a model; every key and shape must fit.

    Only ``num_batches_tracked``, which a frozen batch norm does not have, is left out.

    Args:
        model (nn.Module): the model; it stays as it was if something does not fit.
        state_dict (Mapping[str, Tensor]): its weights under facebookresearch/detr's names; or a
            checkpoint that holds them (`weights_of`).

    Raises:
        CheckpointError: names the keys that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    state = {
        key: value
        for key, value in weights_of(state_dict).items()
        if key in own or not key.endswith(".num_batches_tracked")
    }
    problems = _differences(own, state)
    if not problems:
        model.load_state_dict(state)
        return
    if any(key.startswith("detr.") for key in state):
        problems.append("this is a panoptic model, whose heads are not in this version")
    elif any(key.startswith("model.") for key in state):
        problems.append("weights of transformers are converted by tools/convert_checkpoint.py")
    else:
        problems.append("build the model with the architecture of the checkpoint")
    raise CheckpointError("the weights do not fit the model: " + "; ".join(problems))


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    mismatched = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
    return [f"{len(keys)} {name} ({_shorten(keys)})" for name, keys in groups if keys]


def _shorten(keys: list[str]) -> str:
    rest = len(keys) - SHOWN
    return ", ".join(keys[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def model_config_from_checkpoint(checkpoint: Mapping[str, Any]) -> ModelConfig | None:
    """Tell which architecture a checkpoint belongs to.

    From its ``model_config`` (written by this project); else from the shapes of its weights, with
    ``args`` of the original for what shapes do not show (dilation, heads, dropout). Without
    ``args`` those have their defaults.

    Args:
        checkpoint (Mapping): of `read_checkpoint`; or a bare state dict.

    Returns:
        ModelConfig | None: None if these are no weights of a DETR.

    Raises:
        CheckpointError: if it holds no weights at all, or describes a model that this version does
            not know.
    """
    if "model_config" in checkpoint:
        values = checkpoint["model_config"]
        if unknown := sorted(set(values) - FIELDS):
            raise CheckpointError(
                f"model_config: unknown fields {', '.join(unknown)}: "
                "the checkpoint was written by a newer detr_fast"
            )
    else:
        shown = _fields_from_shapes(weights_of(checkpoint))
        if shown is None:
            return None
        args = checkpoint.get("args") or {}
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        values = {key: args[key] for key in FIELDS & set(args)} | shown
    try:
        return ModelConfig(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint describes no valid model: {error}") from error


def _fields_from_shapes(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return the fields of ModelConfig that names and shapes of weights show."""
    needed = ("class_embed.weight", "query_embed.weight", "backbone.0.body.layer3.5.conv1.weight")
    if not all(key in state for key in needed):
        return None

    def depth(stack: str) -> int:
        layer = re.compile(rf"transformer\.{stack}\.layers\.(\d+)\.")
        return len({found[1] for key in state if (found := layer.match(key))})

    if any(state[key].dim() < 2 for key in needed):
        raise CheckpointError("its weights have not the shapes of a DETR")
    shown = {
        "num_classes": len(state["class_embed.weight"]) - 1,
        "num_queries": len(state["query_embed.weight"]),
        "hidden_dim": state["query_embed.weight"].shape[1],
        "enc_layers": depth("encoder"),
        "dec_layers": depth("decoder"),
        "backbone": "resnet101"
        if "backbone.0.body.layer3.22.conv1.weight" in state
        else "resnet50",
        "position_embedding": "learned" if "backbone.1.row_embed.weight" in state else "sine",
    }
    if shown["dec_layers"] == 0:
        return None
    feedforward = state.get("transformer.decoder.layers.0.linear1.weight")
    if feedforward is None or feedforward.dim() < 2:
        raise CheckpointError("its weights have not the shapes of a DETR")
    shown["dim_feedforward"] = len(feedforward)
    if shown["enc_layers"]:
        shown["pre_norm"] = "transformer.encoder.norm.weight" in state
    return shown
