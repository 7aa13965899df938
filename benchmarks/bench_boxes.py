# SPDX-License-Identifier: Apache-2.0
"""Times the box ops against torchvision on one thread.  Asserts equal outputs first.

uv run benchmarks/bench_boxes.py
"""

import torch
import torchvision
from torch.testing import assert_close
from torch.utils.benchmark import Timer

import detr_fast


def boxes(count: int) -> torch.Tensor:
    """``count`` random corner boxes (count, 4)."""
    low, size = torch.rand(2, count, 2)
    return torch.cat([low, low + 0.01 + size / 2], dim=1)


def microseconds(function, *args) -> float:
    """Median time of a call."""
    timer = Timer("f(*args)", globals={"f": function, "args": args}, num_threads=1)
    return timer.blocked_autorange(min_run_time=1).median * 1e6


def forward_backward(op, boxes1, boxes2, weights):
    """Values, and the gradient of the first argument."""
    values = op(boxes1, boxes2)
    return values, *torch.autograd.grad(values, boxes1, weights)


def main() -> None:
    """Print one line per shape and pass."""
    ours, theirs = detr_fast.generalized_box_iou, torchvision.ops.generalized_box_iou
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread")
    for n, m in ((100, 7), (900, 50), (8400, 100)):
        boxes1, boxes2, weights = boxes(n).requires_grad_(), boxes(m), torch.rand(n, m)
        plain = (boxes1.detach(), boxes2)
        assert_close(ours(*plain), theirs(*plain), atol=0, rtol=0)
        trained = (boxes1, boxes2, weights)
        expected = forward_backward(theirs, *trained)
        assert_close(forward_backward(ours, *trained), expected, atol=1e-3, rtol=1e-4)
        for name, call, args in (
            ("forward", lambda op, *a: op(*a), plain),
            ("forward+backward", forward_backward, trained),
        ):
            a, b = microseconds(call, ours, *args), microseconds(call, theirs, *args)
            print(
                f"{n:>5} x {m:<4} {name:<17} {a:9.1f} us   torchvision {b:9.1f} us   {b / a:6.1f}x"
            )


if __name__ == "__main__":
    main()
