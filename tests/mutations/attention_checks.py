# SPDX-License-Identifier: Apache-2.0
"""The checks that a mutant of the attention kernels has to pass.

Both shapes of both kernels, lengths that end within each size of tile, rectangles on one and on
both sides, heads in the layouts of the model, and NaN in all that is not real.  What is due comes
from the reference in float64, the bits of dropout from its own generator.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

import detr_fast  # noqa: F401 (registers the ops)
from detr_fast.reference.attention import KEEP_LEVELS, Rows, attention_keeping, dropout_mask
from tests.mutations.checks import Check

HALF, BFLOAT16 = torch.float16, torch.bfloat16
# a key that is missing or counted twice changes a result by one part in the number of keys
TOLERANCE = {
    HALF: {HALF: {"atol": 1.5e-3, "rtol": 2e-3}, torch.float32: {"atol": 5e-4, "rtol": 5e-4}},
    BFLOAT16: {
        BFLOAT16: {"atol": 1e-2, "rtol": 1.5e-2},
        torch.float32: {"atol": 4e-3, "rtol": 4e-3},
    },
}
EXACT = {HALF: {"atol": 0, "rtol": 0}}  # of padding alone
NAN = float("nan")
SEED = -0x61E2_83C4_AE0F_D59C
MOST_ROWS = 2**23
# of (2, 2, 21, 32), and where it begins
ODD_STRIDES = [
    ((4000, 2000, 64, 2), 0),
    ((4000, 2000, 36, 1), 0),
    ((4000, 1804, 40, 1), 0),
    ((3604, 1800, 40, 1), 0),
    ((4000, 2000, 40, 1), 4),
]


class Case(NamedTuple):
    """Attention of (B, H, Q, 32) and (B, H, K, 32); the other fields are arguments of the op."""

    images: int
    heads: int
    queries: int
    keys: int
    dtype: torch.dtype = HALF
    query_rect: list[list[int]] | None = None
    key_rect: list[list[int]] | None = None
    key_count: list[int] | None = None
    width: int = 1
    kept: int = KEEP_LEVELS
    layout: str = "heads first"
    spread: float = 1.0  # of the scores

    @property
    def few(self) -> bool:
        """Whether warps divide the keys: they take 32 of them a step, not 64."""
        return self.queries <= 128 and self.query_rect is None


CASES = [
    # few queries: the first step alone, groups without keys, images without keys
    Case(1, 1, 1, 1),
    Case(4, 1, 20, 42, key_rect=[[3, 5], [6, 7], [0, 3], [4, 0]], width=7, layout="rows first"),
    Case(3, 1, 70, 75, key_count=[75, 9, 32], layout="image first"),
    Case(1, 1, 17, 400, spread=12),  # four steps a group
    Case(2, 2, 33, 200, key_count=[-4, 1000], kept=200, layout="block"),
    Case(2, 1, 37, 37, kept=21, layout="block"),
    Case(2, 1, 5, 150, key_rect=[[50, 1], [49, 2]], width=3),  # a step is many rows of the grid
    Case(2, 1, 20, 42, key_count=[0, -1], kept=200),
    Case(0, 1, 3, 4),
    Case(1, 0, 4, 4),
    Case(2, 1, 0, 5, kept=9),
    Case(1, 2, 5, 0),
    Case(1, 2, 0, 0),
    # many: the first block of two ends in a tile, rectangles on either side
    Case(2, 2, 156, 156, query_rect=[[12, 13], [5, 9]], key_rect=[[12, 13], [5, 9]], width=13,
         layout="block"),
    Case(4, 1, 42, 70, query_rect=[[6, 3], [3, 7], [2, 1], [2, 2]],
         key_rect=[[10, 7], [4, 1], [5, 5], [3, 0]], width=7),
    Case(1, 1, 160, 260, spread=12, layout="rows first"),
    Case(2, 1, 30, 40, query_rect=[[99, 99], [2, -1]], key_rect=[[1, 4], [-3, 2]], width=10),
    Case(2, 2, 42, 42, query_rect=[[0, 3], [2, -1]], key_rect=[[4, 0], [0, 0]], width=7, kept=99),
    Case(2, 2, 132, 132, query_rect=[[11, 11], [3, 5]], key_rect=[[11, 11], [3, 5]], width=12,
         kept=131, layout="block"),
    Case(1, 1, 120, 120, query_rect=[[3, 37]], key_rect=[[3, 35]], width=40),  # or less than a row
    Case(1, 1, 40, 170, query_rect=[[4, 9]], key_count=[161], width=10, kept=85),
    Case(1, 2, 20, 40, BFLOAT16, key_count=[33], layout="rows first"),
    Case(1, 1, 144, 80, BFLOAT16, kept=200),
]  # fmt: skip


# ---- what is due


def stored(case: Case, rows: list[Rows], real: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The words that a case stores, and which weights it keeps in the padded sequences."""
    shape = (case.images, case.heads, case.queries)
    if case.kept == KEEP_LEVELS:
        return torch.empty(*shape, 0, dtype=torch.int32), None

    def mask(*numbers: Tensor) -> Tensor:
        of_images = (number.expand(case.images, -1) for number in numbers)
        return dropout_mask(SEED, case.heads, case.kept, *of_images)

    in_row, step = (case.keys + 127) // 128 * 4, 32 if case.few else 64
    bits = mask(torch.arange(case.queries), torch.arange(32 * in_row))
    for image in range(case.images):
        queries, keys = (int(which[image].sum()) for which in real)
        bits[image, :, queries:] = False
        bits[image, :, :, -(-keys // step) * step :] = False
    words = (bits.view(*shape, in_row, 32).long() << (torch.arange(32) ^ 7)).sum(-1)
    lengths = (case.queries, case.keys)
    numbers = (of.numbers(case.images, n) for of, n in zip(rows, lengths, strict=True))
    return words.to(torch.int32), mask(*numbers)


def laid_out(heads: Tensor, layout: str) -> Tensor:
    """(B, H, L, 32) in other strides."""
    if layout == "rows first":  # (L, B, H * 32), of a linear layer
        return heads.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if layout == "image first":  # (B, L, H * 32)
        return heads.transpose(1, 2).contiguous().transpose(1, 2)
    return heads


def inputs(case: Case, real: list[Tensor]) -> list[Tensor]:
    """q, k, v and the gradient of the output, NaN where a row is not real."""
    generator = torch.Generator().manual_seed(case.queries + case.keys)
    lengths = (case.queries, case.keys, case.keys, case.queries)
    rows = (real[0], real[1], real[1], real[0])
    tensors = [
        torch.randn(case.images, case.heads, length, 32, generator=generator)
        .masked_fill(~mask[:, None, :, None], NAN)
        for length, mask in zip(lengths, rows, strict=True)
    ]  # fmt: skip
    tensors[0] *= case.spread
    tensors = [tensor.to(case.dtype) for tensor in tensors]
    if case.layout == "block" and case.queries == case.keys:  # (B, L, 3, H, 32)
        block = torch.stack(tensors[:3], 1).permute(0, 3, 1, 2, 4).contiguous()
        tensors[:3] = block.permute(2, 0, 3, 1, 4).unbind()
        return tensors
    return [laid_out(tensor, case.layout) for tensor in tensors]


def reference(case: Case, tensors: list[Tensor], keep: Tensor | None, rows: list[Rows]):
    """Output and logarithm of the sum of exponentials, and the gradients of q, k and v."""
    q, k, v, grad = (tensor.double().detach() for tensor in tensors)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out = attention_keeping(keep, case.kept, q, k, v, *rows)
    real = [of.mask(length) for of, length in zip(rows, (case.queries, case.keys), strict=True)]
    padded = torch.zeros(()).bool() if real[0] is None else ~real[0][:, None, :, None]
    gradients = torch.autograd.grad(out, (q, k, v), grad.masked_fill(padded, 0))
    scores = q.detach() @ k.detach().mT / 32**0.5
    if real[1] is not None:
        scores = scores.masked_fill(~real[1][:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    if real[0] is not None:
        lse = lse.masked_fill(~real[0][:, None], -torch.inf)
    rows_first = [x.transpose(1, 2).to(case.dtype) for x in (out.detach(), *gradients)]
    return rows_first[0], lse.float(), rows_first[1:]


def case_checks(case: Case) -> Iterator[Check]:
    def integers(numbers: list | None) -> Tensor | None:
        return None if numbers is None else torch.tensor(numbers, dtype=torch.int32)

    rects = [integers(x) for x in (case.query_rect, case.key_rect, case.key_count)]
    rows = [Rows(rects[0], None, case.width), Rows(rects[1], rects[2], case.width)]
    real = [
        torch.ones(case.images, length, dtype=torch.bool) if mask is None else mask
        for of, length in zip(rows, (case.queries, case.keys), strict=True)
        for mask in [of.mask(length)]
    ]
    tensors = inputs(case, real)
    words, keep = stored(case, rows, real)
    out, lse, gradients = reference(case, tensors, keep, rows)
    q, k, v, grad = tensors
    seed = None if keep is None else torch.tensor(SEED)
    options = {
        "copies": False if case.layout == "block" else None,
        "every_schedule": case.dtype == HALF,
    }
    tolerance = TOLERANCE[case.dtype] if all(mask.any() for mask in real) else EXACT
    arguments = (q, k, v, *rects, case.width, case.kept)
    yield Check(
        "attention", (*arguments, seed), right=(out, lse, words), tolerance=tolerance, **options
    )
    if case.queries == case.keys:
        gradients = [torch.stack(gradients, 2)]
    before = (grad.transpose(1, 2), q, k, v, out, lse, words)
    # gradients are as large as the other operand of the scores
    looser = {
        case.dtype: {name: x * case.spread for name, x in tolerance.get(case.dtype, {}).items()}
    }
    arguments = (*before, *arguments[3:])
    yield Check(
        "attention_backward", arguments, right=tuple(gradients), tolerance=looser, **options
    )


def placements() -> Iterator[Check]:
    """Each way in which rows do not lie on 16-byte boundaries, and each input that does not."""
    forward, backward = case_checks(Case(2, 2, 9, 21))
    places = [*product([(forward, 0)], ODD_STRIDES)]
    places += [((forward, place), ODD_STRIDES[-1]) for place in (1, 2)]
    places += [((backward, place), ODD_STRIDES[-1]) for place in range(5)]
    for (check, place), (strides, begin) in places:
        heads_second = check is backward and place in (0, 4)  # (B, L, H, D)
        tensor = check.arguments[place]
        tensor = tensor.transpose(1, 2) if heads_second else tensor
        odd = torch.full((12000,), NAN, dtype=HALF).as_strided(tensor.shape, strides, begin)
        odd.copy_(tensor)
        odd = odd.transpose(1, 2) if heads_second else odd
        arguments = (*check.arguments[:place], odd, *check.arguments[place + 1 :])
        yield check._replace(arguments=arguments, copies=True, every_schedule=False)
    check = next(case_checks(Case(1, 1, 1, 1)))
    for step in (7, 2**40):  # strides of one row, one head, one image: of no account
        q = check.arguments[0].as_strided((1, 1, 1, 32), (step, step, step, 1))
        arguments = (q, *check.arguments[1:])
        yield check._replace(arguments=arguments, copies=False, every_schedule=False)


def limits() -> Iterator[Check]:
    """As many images, heads and rows as the kernels count, and one more."""
    for images, heads, queries, keys, message in (
        (65535, 1, 0, 3, ""),
        (1, 65535, 0, 3, ""),
        (65536, 1, 0, 3, "at most 65535 images and heads, got 65536 and 1"),
        (1, 65536, 0, 3, "at most 65535 images and heads, got 1 and 65536"),
        (0, 1, MOST_ROWS, 3, ""),
        (0, 1, 3, MOST_ROWS, ""),
        (0, 1, MOST_ROWS + 1, 3, f"expected at most {MOST_ROWS} rows"),
        (0, 1, 3, MOST_ROWS + 1, f"expected at most {MOST_ROWS} rows"),
    ):
        empty = torch.empty(0, dtype=HALF)
        q = empty.view(images, heads, queries, 32)
        k = torch.zeros((), dtype=HALF).expand(images, heads, keys, 32)
        right = (q.view(images, queries, heads, 32), torch.empty(images, heads, queries))
        right += (torch.empty(images, heads, queries, 0, dtype=torch.int32),)
        arguments = (q, k, k, None, None, None, 1, KEEP_LEVELS, None)
        yield Check("attention", arguments, message, None if message else right)


def refusals() -> Iterator[Check]:
    forward, backward = case_checks(Case(2, 3, 4, 6, kept=200))
    q, k, v = forward.arguments[:3]
    rect, seed = torch.ones(2, 2, dtype=torch.int32), forward.arguments[-1]
    for place, wrong, message in (
        (0, q.float(), "q: expected dtype Half or BFloat16"),
        (0, q[..., :16], "q: expected shape"),
        (0, q[0], "q: expected shape"),
        (1, k[:1], "k: expected shape"),
        (1, k[:, :2], "k: expected shape"),
        (1, k[..., :16], "k: expected shape"),
        (2, v[:1], "v: expected shape"),
        (2, v[:, :2], "v: expected shape"),
        (2, v[:, :, :5], "v: expected shape"),
        (2, v[..., :16], "v: expected shape"),
        (1, k.bfloat16(), "k: expected the dtype of q"),
        (2, v.bfloat16(), "v: expected the dtype of q"),
        (3, rect.long(), "query_rect: expected dtype Int"),
        (3, rect[:1], "query_rect: expected shape (2, 2)"),
        (4, rect[:, :1], "key_rect: expected shape (2, 2)"),
        (5, rect, "key_count: expected shape (2,)"),
        (7, 0, "kept: expected 1 to 256, got 0"),
        (7, 257, "kept: expected 1 to 256, got 257"),
        (7, 256, "seed: expected one if and only if"),
        (8, None, "seed: expected one if and only if"),
        (8, seed.int(), "seed: expected dtype Long"),
        (8, seed[None], "seed: expected shape ()"),
    ):
        arguments = (*forward.arguments[:place], wrong, *forward.arguments[place + 1 :])
        yield Check("attention", arguments, message)
    for place, name in ((3, "query_rect"), (4, "key_rect")):
        for width in (-1, 0, 5):
            arguments = (*forward.arguments[:6], width, *forward.arguments[7:])
            arguments = (*arguments[:place], rect, *arguments[place + 1 :])
            yield Check("attention", arguments, f"{name}: a sequence of")
    arguments = (*forward.arguments[:4], rect, rect[0], *forward.arguments[6:])
    yield Check("attention", arguments, "key_rect and key_count: expected at most one")
    grad, out, lse, keep = (backward.arguments[place] for place in (0, 4, 5, 6))
    for place, wrong, message in (
        (0, grad[:, :3], "grad: expected shape"),
        (0, grad.bfloat16(), "grad: expected the dtype of q"),
        (4, out[:, :3], "out: expected shape"),
        (4, out.bfloat16(), "out: expected the dtype of q"),
        (5, lse[:, :, :3], "lse: expected shape"),
        (5, lse.double(), "lse and keep: expected dtypes"),
        (6, keep[..., :0], "keep: expected shape"),
        (6, keep.long(), "lse and keep: expected dtypes"),
        (11, 256, "keep: expected shape"),
        (11, 0, "kept: expected 1 to 256, got 0"),
    ):
        arguments = (*backward.arguments[:place], wrong, *backward.arguments[place + 1 :])
        yield Check("attention_backward", arguments, message)


def all_checks() -> list[Check]:
    cases = (check for case in CASES for check in case_checks(case))
    return [*cases, *placements(), *limits(), *refusals()]
