# SPDX-License-Identifier: Apache-2.0
"""A CUDA graph on the CPU: operators with their tensors and numbers, done again without Python."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Tape(TorchDispatchMode):
    """Keeps every operator below autograd, and what it has written over."""

    def __init__(self):
        super().__init__()
        self.calls, self.overwritten = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [*args, *(kwargs.get(a.name) for a in func._schema.arguments[len(args) :])]
        for argument, value in zip(func._schema.arguments, given, strict=True):
            if _is_written(argument):
                written = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
                self.overwritten += [(tensor, tensor.clone()) for tensor in written]
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def undo(self):
        for tensor, before in reversed(self.overwritten):
            tensor.copy_(before)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for own, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(own, Tensor) and own.untyped_storage()._cdata != (
                    new.untyped_storage()._cdata  # or else a view, or written in place
                ):
                    own.copy_(new)


def _is_written(argument):
    of_statistics = argument.name.startswith("running_")  # batch norm does not say so
    return of_statistics or (argument.alias_info is not None and argument.alias_info.is_write)


class TapeRecorder:
    """Records as CUDA does: addresses and Python's numbers are those of the recording.

    Args:
        room (int): how many recordings there is room for.
    """

    def __init__(self, room=1000):
        self.room, self.runs, self.recordings = room, 0, 0

    def run(self, work):
        self.runs += 1
        return work()

    def record(self, work):
        self.recordings += 1
        tape, random = _Tape(), torch.get_rng_state()
        with tape:
            result = work()
        tape.undo()
        torch.set_rng_state(random)
        for leaf in tree_leaves(result):  # as on a GPU: nothing is computed yet
            if isinstance(leaf, Tensor):
                leaf.fill_(torch.nan)
        return result, tape.replay

    def why_full(self):
        return "" if self.recordings < self.room else "no room"
