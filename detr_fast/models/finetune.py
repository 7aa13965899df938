# SPDX-License-Identifier: Apache-2.0
"""Weights of a checkpoint for a model with other classes or another number of queries."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from detr_fast.models.checkpoint import load_weights, weights_of

CLASS_HEAD = ("class_embed.weight", "class_embed.bias")
QUERIES = "query_embed.weight"
SHOWN = 4  # class names in a message


def load_fitting_weights(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    names: Mapping[int, str],
    earlier_names: Mapping[int, str] | None,
) -> list[str]:
    """Load all weights but those of the classes and queries that the checkpoint does not know.

    Classes are compared by name: the rows of the class head that belong to names of both go where
    the model has the name, the other rows keep their start. With no common name the whole head
    does. Queries keep their start if their number differs.

    Args:
        model (DETR): gets the weights.
        checkpoint (Mapping): as `weights_of` takes it.
        names (Mapping[int, str]): class names of the model.
        earlier_names (Mapping[int, str], optional): those of the checkpoint; None where it tells
            none: then a head of the right size is taken as it is.

    Returns:
        list[str]: one sentence for each part that starts anew.

    Raises:
        CheckpointError: if anything else does not fit; names the keys.
    """
    own, state = model.state_dict(), weights_of(checkpoint)
    said = []
    ours, theirs = (_rows(s, CLASS_HEAD[0]) - 1 for s in (own, state))
    same = dict(names) == dict(earlier_names) if earlier_names is not None else True
    if theirs > 0 and not (ours == theirs and same):
        rows = _common_rows(names, earlier_names or {})
        state |= {k: _merged(own[k], state[k], rows) for k in CLASS_HEAD if k in state}
        kept = f"; {len(rows)} of them known by name are kept" if rows else ""
        said.append(
            f"class head: the checkpoint has {_listed(theirs, earlier_names)}, the data have "
            f"{_listed(ours, names)}: it starts anew{kept}"
        )
    ours, theirs = (_rows(s, QUERIES) for s in (own, state))
    if theirs not in (0, ours):
        said.append(f"queries: the checkpoint has {theirs}, the model {ours}: they start anew")
        state[QUERIES] = own[QUERIES]
    load_weights(model, state)
    return said


def _rows(state: Mapping[str, Tensor], key: str) -> int:
    """Rows of a matrix; 0 where there is none."""
    return len(state[key]) if key in state and state[key].dim() == 2 else 0


def _common_rows(names: Mapping[int, str], earlier: Mapping[int, str]) -> dict[int, int]:
    """Label -> label of the checkpoint, for the names that both have."""
    place = {name: label for label, name in earlier.items()}
    return {label: place[name] for label, name in names.items() if name in place}


def _merged(own: Tensor, state: Tensor, rows: Mapping[int, int]) -> Tensor:
    """The head at its start, with the rows that are known and, beside them, no-object's."""
    if not rows or own.shape[1:] != state.shape[1:]:
        return own
    merged = own.clone()
    merged[-1] = state[-1]
    for label, earlier in rows.items():
        if earlier < len(state) - 1:
            merged[label] = state[earlier]
    return merged


def _listed(count: int, names: Mapping[int, str] | None) -> str:
    shown = list((names or {}).values())
    if not shown:
        return f"{count} classes"
    dots = ", ..." if len(shown) > SHOWN else ""
    return f"{count} classes ({', '.join(shown[:SHOWN])}{dots})"
