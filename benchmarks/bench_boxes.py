# SPDX-License-Identifier: Apache-2.0
"""Box ops against torchvision on one CPU thread: ``uv run pytest benchmarks/``.

Equal outputs are asserted before anything is timed. Absolute times on a shared machine are noise;
the ratio to the peer, measured in the same process, is in the column of extra information and on
the line that each case prints (``-s`` shows it).
"""

import pytest
import torch
import torchvision
from torch.testing import assert_close
from torch.utils.benchmark import Timer

import detr_fast

SHAPES = [(100, 7), (900, 50), (8400, 100)]


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low, size = torch.rand(2, count, 2, generator=generator)
    return torch.cat([low, low + 0.01 + size / 2], dim=1)


def forward(op, boxes1, boxes2, weights):
    return op(boxes1, boxes2)


def forward_backward(op, boxes1, boxes2, weights):
    boxes1 = boxes1.requires_grad_()
    values = op(boxes1, boxes2)
    return values, *torch.autograd.grad(values, boxes1, weights)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("run", [forward, forward_backward], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("n", "m"), SHAPES, ids=lambda size: str(size))
def test_generalized_box_iou(benchmark, one_thread, run, n, m):
    arguments = (random_boxes(n, 1), random_boxes(m, 2), torch.rand(n, m))
    ours, theirs = detr_fast.generalized_box_iou, torchvision.ops.generalized_box_iou
    # float32 gradients are sums of up to 100 terms, added in another order
    tolerance = {"atol": 0, "rtol": 0} if run is forward else {"atol": 1e-3, "rtol": 1e-4}
    assert_close(run(ours, *arguments), run(theirs, *arguments), **tolerance)
    benchmark(run, ours, *arguments)
    if benchmark.enabled:
        timer = Timer(
            "run(op, *arguments)", globals={"run": run, "arguments": arguments} | {"op": theirs}
        )
        peer = timer.blocked_autorange(min_run_time=0.5).median
        ratio = peer / benchmark.stats.stats.median
        benchmark.extra_info["torchvision / ours"] = round(ratio, 1)
        print(f"{n} x {m} {run.__name__}: {ratio:.1f}x torchvision {torchvision.__version__}")
