# SPDX-License-Identifier: Apache-2.0
"""Finds what would wait for a GPU, without one: on the meta device, whose tensors hold no data."""

from collections import Counter
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}
READS |= {"__array__", "__contains__", "equal", "allclose", "is_nonzero"}
# of Python data they make a tensor on the host, and copy it from memory that is not page-locked
FROM_PYTHON = {"tensor", "as_tensor", "asarray", "from_numpy"}
SIZED_BY_DATA = torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output


class WaitsForTheDeviceError(AssertionError):
    """Something would make the host wait for the device."""


class _Calls(TorchFunctionMode):
    """Refuses calls that bring numbers to the host, on tensors of any device.

    What happens to a tensor on the CPU here, happens to one on the GPU there.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS:
            raise WaitsForTheDeviceError(f"{name}() brings data to the host")
        if name in FROM_PYTHON and not isinstance(args[0], Tensor):
            raise WaitsForTheDeviceError(f"torch.{name}() copies data of Python")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Refuses operators that need to know data or copy from device to device; counts the others.

    It sees the backward pass and what operators call in turn, too.
    """

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.calls[func.overloadpacket] += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._check_index(func, args)
        if set(func.tags) & set(SIZED_BY_DATA) and not self._is_index(func):
            raise WaitsForTheDeviceError(f"{func} asks for data")
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            self._check_copy(func, args, kwargs)
        elif len({tensor.device for tensor in tensors if tensor.dim()}) > 1:
            raise WaitsForTheDeviceError(f"{func} copies an operand to the device")
        return func(*args, **kwargs)

    @staticmethod
    def _is_index(func):
        return func.overloadpacket in (aten.index, aten.index_put, aten.index_put_)

    def _check_index(self, func, args):
        if self._is_index(func) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise WaitsForTheDeviceError(f"{func} counts what a mask chooses")

    @staticmethod
    def _check_copy(func, args, kwargs):
        if func.overloadpacket is aten.copy_:
            (into, values, *rest) = args
            devices, non_blocking = {into.device, values.device}, kwargs.get("non_blocking", rest)
        else:
            devices = {args[0].device, torch.device(kwargs.get("device") or args[0].device)}
            non_blocking = kwargs.get("non_blocking")
        if len(devices) > 1 and non_blocking not in (True, [True]):
            raise WaitsForTheDeviceError(f"{func} copies from device to device, and waits")


@contextmanager
def no_sync():
    """Within this context, waiting for the device is an error; yields a count of all operators."""
    operators = _Operators()
    with _Calls(), operators:
        yield operators.calls
