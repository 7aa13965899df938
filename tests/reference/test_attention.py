# SPDX-License-Identifier: Apache-2.0
"""The reference attention against torch's, and its dropout against dropout.h and rows.h in C++."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from detr_fast import reference
from detr_fast.reference.attention import Rows, _philox, dropout_mask
from tests.cudasim.build import CACHE, CSRC, digest, make

SOURCE = """
#include "attention/dropout.h"
#include "attention/rows.h"

using namespace detr_fast;

extern "C" {

// 1 where dropout keeps: of (problems, queries, keys)
void keep(uint64_t seed, int problems, int queries, int keys, int kept, uint8_t* out) {
  for (int p = 0; p < problems; ++p) {
    for (int q = 0; q < queries; ++q) {
      for (int k = 0; k < keys; ++k) {
        *out++ = keep_word(seed, p, q, k / kKeysInWord, kept) >> keep_bit(k) & 1;
      }
    }
  }
}

int words(int keys) { return keep_words(keys); }

// of each position its number, or -1; returns how many rows are real, or -1 where rows.h disagrees
// with itself
int numbers(const int32_t* rect, const int32_t* count, int image, int length, int padded_width,
            int64_t* out) {
  const Rows rows = rows_of(rect, count, image, length, padded_width);
  for (int i = 0; i < length; ++i) out[i] = -1;
  int last = -1;
  for (int number = 0; number < rows.count; ++number) {
    const int position = rows.position(number);
    if (position <= last || position >= length || !rows.real(position)) return -1;
    out[last = position] = number;
  }
  int real = 0;
  for (int i = 0; i < length; ++i) real += rows.real(i);
  return real == rows.count && last < rows.end() ? real : -1;
}

int64_t of_strides(int64_t image_step, int64_t head_step, int row_step, int image, int head,
                   int row) {
  return offset(HeadsInput{nullptr, image_step, head_step, row_step}, image, head, row);
}

int64_t of_rows_first(int image, int row, int head, int rows, int heads, int columns) {
  return rows_first(image, row, head, rows, heads, columns);
}

int64_t of_heads_first(int image, int head, int row, int heads, int rows, int columns) {
  return heads_first(image, head, row, heads, rows, columns);
}

}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The functions of rows.h and dropout.h that host and device share."""
    source = tmp_path_factory.mktemp("attention") / "attention.cpp"
    source.write_text(SOURCE)
    headers = [CSRC / "attention/rows.h", CSRC / "attention/dropout.h", *CSRC.glob("common/*.h")]
    flags = ["-std=c++20", "-O1", "-Wall", "-fPIC", "-shared", f"-I{CSRC}"]
    flags += ["-fsanitize=signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
    target = CACHE / f"attention_rows-{digest(source, *sorted(headers), flags)}.so"
    library = ctypes.CDLL(str(make(target, *flags, source)))
    for name in ("of_strides", "of_rows_first", "of_heads_first"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def random_qkv(queries, keys, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 3, rows, 8, generator=g, dtype=dtype).requires_grad_()
        for rows in (queries, keys, keys)
    ]


def test_equals_torch():
    q, k, v = random_qkv(5, 7)
    ours = reference.attention(q, k, v)
    theirs = F.scaled_dot_product_attention(q, k, v)
    assert_close(ours, theirs)
    grads = [torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (ours, theirs)]
    assert_close(*grads)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_is_that_of_torch(kind):
    q, k, v = random_qkv(5, 7)
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    mask = mask if kind == "bool" else mask.double().log()
    ours = reference.attention(q, k, v, mask=mask)
    assert_close(ours, F.scaled_dot_product_attention(q, k, v, mask))


def test_padding_is_what_multihead_attention_masks():
    """The rectangles of DETR's masks, whose padded queries are 0 here."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(24, 3, batch_first=True, bias=False, dtype=torch.float64)
    module.out_proj.weight.data.copy_(torch.eye(24))
    x = torch.randn(2, 4 * 6, 24, dtype=torch.float64)
    rect = torch.tensor([[3, 5], [4, 2]], dtype=torch.int32)
    padding = torch.ones(2, 4, 6, dtype=torch.bool)
    for image, (h, w) in zip(padding, rect.tolist(), strict=True):
        image[:h, :w] = False
    padding = padding.flatten(1)
    theirs, weights = module(x, x, x, key_padding_mask=padding)
    projected = F.linear(x, module.in_proj_weight).unflatten(-1, (3, 3, 8))
    q, k, v = (part.transpose(1, 2) for part in projected.unbind(2))
    rows = {"query_rect": rect, "key_rect": rect, "padded_width": 6}
    ours = reference.attention(q, k, v, **rows).transpose(1, 2).flatten(2)
    assert_close(ours, theirs.masked_fill(padding[..., None], 0))
    found = reference.attention_weights(q, k, **rows)
    assert_close(found, weights.masked_fill(padding[..., None], 0).float())


def test_weights_for_pictures_are_float32_under_autocast():
    q, k = torch.randn(2, 1, 2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = reference.attention_weights(q, k)
    assert torch.equal(found, reference.attention_weights(q, k))


def test_dropout_divides_by_what_it_keeps():
    q, k, v = random_qkv(400, 64)
    torch.manual_seed(0)
    out = reference.attention(q, k, torch.ones_like(v), dropout_p=0.3)
    assert abs(out.mean() - 1) < 4 * out[..., 0].std() / out[..., 0].numel() ** 0.5
    none = reference.attention(q, k, v, dropout_p=1.0)
    assert not none.any()


# ---- what the kernels share with it


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(
    ("counter", "key", "random"),
    [
        ("0 0 0 0", "0 0", "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "5207ddc2 45165e59 4d8ee751 8c52f662",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_its_known_answers(counter, key, random):
    """Of the authors' Random123, philox4x32 with 7 rounds."""
    low, high = words(key)
    found = _philox(tuple(map(torch.tensor, words(counter))), high << 32 | low)
    assert [int(word) for word in found] == words(random)


@pytest.mark.parametrize("kept", [1, 128, 230, 255])
@pytest.mark.parametrize("seed", [0, 3, 2**63 - 1, -(2**62) - 7])
def test_dropout_is_that_of_the_kernels(compiled, seed, kept):
    images, heads, queries, keys = 2, 3, 5, 131
    expected = torch.empty(images, heads, queries, keys, dtype=torch.uint8)
    pointer = ctypes.c_void_p(expected.data_ptr())
    compiled.keep(ctypes.c_uint64(seed % 2**64), images * heads, queries, keys, kept, pointer)
    rows = [Rows().numbers(images, length) for length in (queries, keys)]
    assert_close(dropout_mask(seed, heads, kept, *rows), expected.bool())


def test_dropout_goes_by_the_numbers_of_real_rows():
    rect = torch.tensor([[2, 3], [1, 4]], dtype=torch.int32)
    numbers = Rows(rect, None, 5).numbers(2, 15)
    assert numbers.tolist()[0] == [0, 1, 2, -1, -1, 3, 4, 5, *[-1] * 7]
    mask = dropout_mask(7, 2, 128, numbers, numbers)
    plain = dropout_mask(7, 2, 128, *[Rows().numbers(2, 15)] * 2)
    for image, count in enumerate((6, 4)):
        real = numbers[image] >= 0
        found = mask[image][:, real][..., real]
        assert_close(found, plain[image, :, :count, :count])
        assert mask[image].sum() == found.sum()


@pytest.mark.parametrize("keys", [0, 1, 128, 129, 4097])
def test_words_of_a_row(compiled, keys):
    assert compiled.words(keys) == -(-keys // 128) * 4


@pytest.mark.parametrize("width", [1, 4, 6])
def test_rows_are_those_of_the_kernels(compiled, width):
    length = 24
    rect = torch.tensor(
        [[h, w] for h in (-2, 0, 1, 3, 99) for w in (-1, 0, 1, 3, 4, 6, 7)], dtype=torch.int32
    )
    count = torch.tensor([-3, 0, 1, 23, 24, 99], dtype=torch.int32)
    for given, rows in ((rect, Rows(rect, None, width)), (count, Rows(None, count))):
        expected = rows.numbers(len(given), length)
        pointers = [ctypes.c_void_p(given.data_ptr()), None]
        for image in range(len(given)):
            found = torch.empty(length, dtype=torch.int64)
            arguments = pointers if given is rect else pointers[::-1]
            real = compiled.numbers(
                *arguments, image, length, width, ctypes.c_void_p(found.data_ptr())
            )
            assert real == (expected[image] >= 0).sum()
            assert_close(found, expected[image])


def test_offsets_go_beyond_32_bits(compiled):
    """Of 64 images, 8 heads and 65536 rows q has 2^30 elements, a fused projection three times."""
    big = ctypes.c_int64
    step = 3 * 8 * 32
    image_step = 65536 * step
    found = compiled.of_strides(big(image_step), big(32), step, 63, 7, 65535)
    assert found == 63 * image_step + 7 * 32 + 65535 * step > 2**31
    row = 2**30 - 1
    assert compiled.of_strides(big(0), big(0), step, 0, 0, row) == row * step > 2**31
    sizes = (4096, 65536, 8, 32)  # images, rows, heads, columns
    last = 4096 * 65536 * 8 * 32 - 32
    assert compiled.of_rows_first(4095, 65535, 7, *sizes[1:]) == last
    assert compiled.of_heads_first(4095, 7, 65535, 8, 65536, 32) == last
