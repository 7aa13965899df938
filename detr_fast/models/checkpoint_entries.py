# SPDX-License-Identifier: Apache-2.0
"""What the entries of a checkpoint must be, whoever wrote it."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit; the message names the file and the remedy."""


def validated(checkpoint: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the checkpoint with each entry that this package reads of the type that it expects.

    A list of class names, as other code bases store it, becomes a dict; an entry that is None is
    taken out.

    Args:
        checkpoint (Mapping): what the file holds.
        source (str): its name in errors.

    Raises:
        CheckpointError: names the entry.
    """
    kept = {name: value for name, value in checkpoint.items() if value is not None}
    if isinstance(kept.get("class_names"), list):
        kept["class_names"] = dict(enumerate(kept["class_names"]))
    for name, (expected, fits) in _ENTRIES.items():
        if name in kept and not fits(kept[name]):
            raise CheckpointError(
                f"{source}: its entry {name!r} is malformed: expected {expected}, found "
                f"{_brief(kept[name])}; save it anew without this entry"
            )
    return kept


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value < 2**53


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _dict_of(key: type, value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda entry: (
        isinstance(entry, dict) and all(type(k) is key and value(v) for k, v in entry.items())
    )


def _anything(_: Any) -> bool:
    return True


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_meter(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"window", "total", "count"}
        and isinstance(value["window"], list)
        and all(map(_number, [*value["window"], value["total"], value["count"]]))
    )


def _is_progress(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() >= {"batch", "meters", "best_epoch", "images"}
        and _whole(0)(value["batch"])
        and _whole(-1)(value["best_epoch"])
        and _dict_of(str, _is_meter)(value["meters"])
        and isinstance(value["images"], (list, tuple))
        and all(map(_whole(0), value["images"]))
    )


def _is_optimizer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("state"), dict)
        and isinstance(value.get("param_groups"), list)
        and all(
            isinstance(group, dict)
            and isinstance(group.get("params"), list)
            and all(_number(group.get(key, 0)) for key in ("lr", "initial_lr"))
            for group in value["param_groups"]
        )
    )


def _brief(value: Any) -> str:
    text = ascii(value) if isinstance(value, (int, float, str)) else type(value).__name__
    return text[:60]


_WEIGHTS = ("a state dict: names and tensors", _dict_of(str, _is_tensor))
_ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": _WEIGHTS,
    "state_dict": _WEIGHTS,
    "ema": _WEIGHTS,
    "args": ("flags", lambda v: isinstance(v, Namespace) or _dict_of(str, _anything)(v)),
    "model_config": ("a dict of flags", _dict_of(str, _anything)),
    "class_names": ("a dict of label and name", _dict_of(int, _is_text)),
    "category_ids": ("a dict of label and category id", _dict_of(int, _whole(0))),
    "epoch": ("a whole number", _whole(-1)),
    "best_ap": ("a number", _number),
    "steps": ("a whole number", _whole(0)),
    "progress": ("the place in an epoch", _is_progress),
    "random": ("states of random numbers", _dict_of(str, _anything)),
    "optimizer": ("the state of an optimizer", _is_optimizer),
    "lr_scheduler": (
        "the state of StepLR",
        lambda v: isinstance(v, dict) and _whole(0)(v.get("last_epoch")),
    ),
    "scaler": ("the state of a GradScaler", _dict_of(str, _number)),
    "learning": ("lists of names", lambda v: isinstance(v, list)),
}
