# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled libraries, tells which of them run, and puts the reference in their place."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar, overload

import torch

try:
    import detr_fast._C as _C
except ImportError as error:
    raise ImportError(
        f"the compiled part of detr_fast does not load under torch {torch.__version__}: {error}.\n"
        "In a checkout, build it with `uv sync` or `pip install -e . --no-build-isolation`. If "
        "detr_fast is installed elsewhere, do not run Python from the checkout's root."
    ) from error


P = ParamSpec("P")
Result = TypeVar("Result")


def _load_cuda() -> str | None:
    """Load ``_C_cuda``; return why there is none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    spec = find_spec("detr_fast._C_cuda")
    if spec is None or _C.build.startswith("without"):  # an older build may have left one
        return f"built {_C.build}"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        warnings.warn(f"detr_fast runs without its CUDA kernels: {error}", stacklevel=2)
        return str(error)
    return None


_why_no_cuda = _load_cuda()
_reference_in_use = False


Path = tuple[str, str]
_choices: dict[str, Callable[..., Path]] = {}
_LEAST_CAPABILITY = (8, 0)  # what the kernels are compiled for: bfloat16, cp.async


def chooses_path(op: str) -> Callable[[Callable[P, Path]], Callable[P, Path]]:
    """Decorate what says which path ``op`` takes for given inputs, and why: see `backend`."""

    def decorate(choice: Callable[P, Path]) -> Callable[P, Path]:
        _choices[op] = choice
        return choice

    return decorate


@torch.compiler.assume_constant_result
def why_no_kernel(op: str, device: torch.device) -> str:
    """Why a compiled ``op`` does not run on a device; nothing where it does."""
    if device.type == "cuda":
        return _why_not_on_gpu(op, device)
    key = torch._C._dispatch_key_for_device(device.type)
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"detr_fast::{op}", key)
    return "" if registered else f"no kernel for {device.type}"


@functools.cache
def _why_not_on_gpu(op: str, device: torch.device) -> str:
    if _why_no_cuda:
        return _why_no_cuda
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"detr_fast::{op}", "CUDA"):
        return "no kernel for cuda"
    if not torch.cuda.is_available():  # a fake tensor
        return "torch sees no GPU"
    found = torch.cuda.get_device_capability(device)
    if found < _LEAST_CAPABILITY:
        least = ".".join(map(str, _LEAST_CAPABILITY))
        return f"compute capability {found[0]}.{found[1]}, compiled for {least} and above"
    return ""


@overload
def backend() -> dict[str, str]: ...


@overload
def backend(op: str, *inputs: Any, **options: Any) -> Path: ...


def backend(op: str | None = None, *inputs: Any, **options: Any) -> dict[str, str] | Path:
    """Tell what runs the ops on each type of device, or one op on given inputs, and why.

    Args:
        op (str | None): name of an op that has several paths: ``"attention"``,
            ``"normalize_images"``.
        *inputs: what it would be called with; no number in a tensor is looked at.
        **options: the same.

    Returns:
        dict[str, str] | tuple[str, str]: without an op, for ``"cpu"`` and ``"cuda"``,
        ``"compiled"`` or ``"reference"`` with how the package was built, or ``"none"`` with the
        reason.  With one, its path (``"fused"``, ``"sdpa"``, ``"by_heads"`` or ``"reference"``)
        and the reason.

    Raises:
        ValueError: if the op is unknown.

    Examples:
        >>> detr_fast.ops.backend()  # doctest: +SKIP
        {'cpu': 'compiled (with CUDA 13.0 for 9.0+PTX)', 'cuda': 'compiled (...)'}
        >>> detr_fast.ops.backend("attention", q, k, v)  # doctest: +SKIP
        ('sdpa', 'dtype torch.float32')
    """
    if op is not None:
        if op not in _choices:
            raise ValueError(f"op: expected one of {', '.join(map(repr, _choices))}, got {op!r}")
        if _reference_in_use:
            return "reference", "within use_reference()"
        return _choices[op](*inputs, **options)
    name = "reference" if _reference_in_use else "compiled"
    here = f"{name} ({_C.build})"
    no_cuda = _why_no_cuda and not _reference_in_use
    return {"cpu": here, "cuda": f"none ({_why_no_cuda})" if no_cuda else here}


@contextmanager
def use_reference() -> Iterator[None]:
    """Within this context every op runs its reference twin, in all threads.

    Examples:
        >>> with detr_fast.ops.use_reference():  # doctest: +SKIP
        ...     expected = detr_fast.generalized_box_iou(boxes1, boxes2)
    """
    global _reference_in_use
    before, _reference_in_use = _reference_in_use, True
    try:
        yield
    finally:
        _reference_in_use = before


def with_reference(
    reference: Callable[P, Result], check: Callable[..., None] | None = None
) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Decorate an op with its reference twin, which `use_reference` calls instead.

    ``check`` is called with the arguments before either of them.
    """

    def decorate(op: Callable[P, Result]) -> Callable[P, Result]:
        @functools.wraps(op)
        def run(*args: P.args, **kwargs: P.kwargs) -> Result:
            if check is not None:
                check(*args, **kwargs)
            return (reference if _reference_in_use else op)(*args, **kwargs)

        return run

    return decorate
