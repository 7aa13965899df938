# SPDX-License-Identifier: Apache-2.0
"""Puts the matchers of this package into installed libraries, and takes them out again."""

from __future__ import annotations

import importlib
import inspect
import sys
from importlib.util import find_spec
from types import TracebackType
from typing import Any, NamedTuple

__all__ = ["Patch", "patch"]


class Entry(NamedTuple):
    """A matcher of a library and ours of the same attributes.

    Attributes:
        theirs (str): ``module:class`` in the library.
        ours (str): ``module:class`` below ``detr_fast.matcher``.
        methods (tuple[str, ...]): what of their class is replaced.
    """

    theirs: str
    ours: str
    methods: tuple[str, ...] = ("forward",)


_MASKS = "transformers:Mask2FormerHungarianMatcher"
_LIBRARIES: dict[str, tuple[Entry, ...]] = {
    "transformers": (
        Entry("loss.loss_for_object_detection:HungarianMatcher", "transformers:HungarianMatcher"),
        Entry(
            "loss.loss_deformable_detr:DeformableDetrHungarianMatcher",
            "transformers:DeformableDetrHungarianMatcher",
        ),
        Entry(
            "loss.loss_grounding_dino:GroundingDinoHungarianMatcher",
            "transformers:GroundingDinoHungarianMatcher",
        ),
        Entry("loss.loss_lw_detr:LwDetrHungarianMatcher", "transformers:LwDetrHungarianMatcher"),
        Entry("loss.loss_rf_detr:RfDetrHungarianMatcher", "transformers:RfDetrHungarianMatcher"),
        Entry("loss.loss_rt_detr:RTDetrHungarianMatcher", "transformers:RTDetrHungarianMatcher"),
        Entry("models.eomt.modeling_eomt:EomtHungarianMatcher", _MASKS),
        Entry("models.eomt_dinov3.modeling_eomt_dinov3:EomtDinov3HungarianMatcher", _MASKS),
        Entry("models.mask2former.modeling_mask2former:Mask2FormerHungarianMatcher", _MASKS),
        Entry("models.oneformer.modeling_oneformer:OneFormerHungarianMatcher", _MASKS),
        Entry("models.videomt.modeling_videomt:VideomtHungarianMatcher", _MASKS),
    ),
    "rfdetr": (
        Entry(
            "models.matcher:HungarianMatcher",
            "rfdetr:HungarianMatcher",
            ("forward", "_match_many", "_precompute_target_side_safety"),
        ),
    ),
    "detrex": (Entry("modeling.matcher.matcher:HungarianMatcher", "detrex:HungarianMatcher"),),
    "mask2former": (Entry("modeling.matcher:HungarianMatcher", "mask2former:HungarianMatcher"),),
    "maskdino": (
        Entry("modeling.matcher:HungarianMatcher", "mask2former:MaskDINOHungarianMatcher"),
    ),
    "mmdet": (
        Entry(
            "models.task_modules.assigners.hungarian_assigner:HungarianAssigner",
            "mmdet:HungarianAssigner",
            ("assign",),
        ),
    ),
}


class Patch:
    """Matchers that were put into a library.

    Undone by `undo`, or at the end of a ``with`` statement.
    """

    def __init__(self, library: str, swapped: list[tuple[type, str, Any]]) -> None:
        self.library = library
        self._swapped = swapped

    def undo(self) -> None:
        """Put the library's own methods back; a second call does nothing."""
        while self._swapped:
            owner, name, original = self._swapped.pop()
            setattr(owner, name, original)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        names = ", ".join(f"{owner.__name__}.{name}" for owner, name, _ in self._swapped)
        return f"Patch({self.library!r}: {names or 'nothing swapped'})"


def patch(library: str) -> Patch:
    """Let the matchers of an installed library run the ops of this package.

    The matching methods of the library's classes are replaced, so that models and criteria that
    exist already match faster, too, and ``isinstance`` holds.  A subclass with its own method
    keeps it.  A class that is replaced already is left alone.

    Args:
        library (str): ``"transformers"``, ``"rfdetr"``, ``"detrex"``, ``"mask2former"``,
            ``"maskdino"`` or ``"mmdet"``.

    Returns:
        Patch: tells by its ``repr`` what was replaced; ``undo()`` or the end of a ``with``
        statement takes it back.

    Raises:
        ValueError: if the library is not known here.
        ImportError: if it is not installed, or something that it needs.
        RuntimeError: if its version has no matcher known here, or one with other arguments.

    Examples:
        >>> with detr_fast.matcher.patch("transformers"):  # doctest: +SKIP
        ...     loss = model(pixel_values, labels=labels).loss
    """
    if library not in _LIBRARIES:
        raise ValueError(f"library: expected one of {', '.join(_LIBRARIES)}, got {library!r}")
    if library not in sys.modules and find_spec(library) is None:
        raise ImportError(f"{library} is not installed here: there is nothing to patch")
    swaps, known = [], 0
    for entry in _LIBRARIES[library]:
        theirs = _find(f"{library}.{entry.theirs}")
        if theirs is None:
            continue
        known += 1
        ours = _find(f"detr_fast.matcher.{entry.ours}")
        for name in entry.methods:
            original, ours_method = vars(theirs).get(name), getattr(ours, name)
            # None: inherited, or not in this version
            if original is None or original is ours_method:
                continue
            _check_arguments(library, theirs, original, ours_method)
            swaps.append((theirs, name, ours_method))
    if not known:
        raise RuntimeError(
            f"{library} {_version(library)} has none of the matchers known here: "
            f"{', '.join(entry.theirs for entry in _LIBRARIES[library])}"
        )
    swapped = []
    for owner, name, method in swaps:
        swapped.append((owner, name, vars(owner)[name]))
        setattr(owner, name, method)
    return Patch(library, swapped)


def _find(path: str) -> type | None:
    """The class ``module:class``; None where the library has no such module or class."""
    module, name = path.split(":")
    try:
        found: type | None = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            return None
        raise ImportError(
            f"{module} cannot be imported here, for it needs {error.name}: install that first"
        ) from error
    return found


def _check_arguments(library: str, owner: type, original: Any, ours: Any) -> None:
    theirs, known = (list(inspect.signature(f).parameters) for f in (original, ours))
    if not set(theirs) <= set(known):
        raise RuntimeError(
            f"{owner.__name__}.{original.__name__} of {library} {_version(library)} has the "
            f"arguments ({', '.join(theirs)}), those known here are ({', '.join(known)}): "
            "use a version of the library that is known here"
        )


def _version(library: str) -> str:
    return str(getattr(importlib.import_module(library), "__version__", "of unknown version"))
