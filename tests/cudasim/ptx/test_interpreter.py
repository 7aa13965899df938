# SPDX-License-Identifier: Apache-2.0
"""The interpreter itself: PTX written by hand against numpy, and kernels broken on purpose."""

import math

import numpy as np
import pytest

from tests.cudasim.ptx import Module, PtxError, launch

REGISTERS = """
  .reg .pred %p<3>; .reg .b16 %h<4>; .reg .b32 %r<4>; .reg .f32 %f<4>;
  .reg .b64 %l<4>; .reg .f64 %d<4>; .reg .b64 %a<4>;
"""
BINARY = """
  mov.u32 %r3, %tid.x;
  ld.param.u64 %a0, [x]; mad.wide.u32 %a0, %r3, {size}, %a0;
  ld.param.u64 %a1, [y]; mad.wide.u32 %a1, %r3, {size}, %a1;
  ld.param.u64 %a2, [z]; mad.wide.u32 %a2, %r3, {out_size}, %a2;
  ld.global.{kind} %{letter}0, [%a0]; ld.global.{kind} %{letter}1, [%a1];
  {body};
  st.global.{out_kind} [%a2], %{out_letter}2;
  ret;
"""
I32 = np.array([0, 1, -1, 7, -7, 100, 2**31 - 1, -(2**31)] * 4, np.int32)
J32 = np.array([1, 3, 5, -2, 2, -9, 31, 33] * 4, np.int32)
F32 = np.array([0, 1.5, -2.25, np.inf, np.nan, 1e-30, 3, -0.5] * 4, np.float32)
G32 = np.array([1, -1.5, np.nan, 2, 4, 1e30, 3, 0.25] * 4, np.float32)
LETTERS = {"f32": "f", "f64": "d", "u64": "l", "s64": "l", "b64": "l", "b16": "h"}
TID = np.arange(32)


def kernel(body, parameters="xyz"):
    declared = ", ".join(f".param .u64 {name}" for name in parameters)
    module = Module(f".visible .entry test({declared})\n{{ {REGISTERS} {body} }}")
    return module.kernels["test"]


def apply(body, x, y, kind, out_kind):
    """Run `body` in 32 threads on their elements of x and y (registers 0 and 1); register 2."""
    out = np.zeros(
        len(x), f"{out_kind[0].replace('b', 'u').replace('s', 'i')}{int(out_kind[1:]) // 8}"
    )
    letters = (LETTERS.get(kind, "r"), LETTERS.get(out_kind, "r"))
    text = BINARY.format(
        body=body, kind=kind, out_kind=out_kind, size=x.itemsize, out_size=out.itemsize,
        letter=letters[0], out_letter=letters[1],
    )  # fmt: skip
    launch(kernel(text), 1, len(x), x, y, out)
    return out


def truncated(x, y):
    return np.array([math.trunc(int(a) / int(b)) for a, b in zip(x, y, strict=True)])


def reversed_bits(x):
    return [int(f"{int(value) & 0xFFFFFFFF:032b}"[::-1], 2) for value in x]


INTEGER = {
    "add.s32 %r2, %r0, %r1": lambda x, y: x + y,
    "sub.s32 %r2, %r0, %r1": lambda x, y: x - y,
    "mul.lo.s32 %r2, %r0, %r1": lambda x, y: x * y,
    "mul.hi.s32 %r2, %r0, %r1": lambda x, y: x.astype(np.int64) * y >> 32,
    "mad.lo.s32 %r2, %r0, %r1, 5": lambda x, y: x * y + 5,
    "div.s32 %r2, %r0, %r1": truncated,
    "rem.s32 %r2, %r0, %r1": lambda x, y: x - truncated(x, y) * y,
    "min.s32 %r2, %r0, %r1": np.minimum,
    "max.s32 %r2, %r0, %r1": np.maximum,
    "min.u32 %r2, %r0, %r1": lambda x, y: np.minimum(x.view(np.uint32), y.view(np.uint32)),
    "neg.s32 %r2, %r0": lambda x, y: -x,
    "abs.s32 %r2, %r0": lambda x, y: np.abs(x),
    "and.b32 %r2, %r0, %r1": lambda x, y: x & y,
    "or.b32 %r2, %r0, %r1": lambda x, y: x | y,
    "xor.b32 %r2, %r0, 0xff": lambda x, y: x ^ 255,
    "not.b32 %r2, %r0": lambda x, y: ~x,
    "shl.b32 %r2, %r0, 3": lambda x, y: x << 3,
    "shr.s32 %r2, %r0, 40": lambda x, y: x >> 31,
    "shr.u32 %r2, %r0, 4": lambda x, y: x.view(np.uint32) >> 4,
    "shr.u32 %r2, %r0, 32": lambda x, y: x * 0,
    "bfi.b32 %r2, %r0, %r1, 4, 8": lambda x, y: y & ~0xFF0 | (x & 0xFF) << 4,
    "mov.b64 %l0, {%r0, %r1}; mov.b64 %l1, {%r1, %r1}; bfi.b64 %l0, %l1, %l0, 32, 32;"
    "mov.b64 {%r3, %r2}, %l0": lambda x, y: y,
    "popc.b32 %r2, %r0": lambda x, y: [f"{int(v) & 0xFFFFFFFF:b}".count("1") for v in x],
    "clz.b32 %r2, %r0": lambda x, y: [32 - (int(v) & 0xFFFFFFFF).bit_length() for v in x],
    "brev.b32 %r2, %r0": lambda x, y: reversed_bits(x),
    "bfind.shiftamt.u32 %r2, %r0": lambda x, y: [
        (32 - (int(v) % 2**32).bit_length()) if v else -1 for v in x
    ],
    "shf.l.wrap.b32 %r2, %r0, %r1, 40": (
        lambda x, y: y << 8 | x.view(np.uint32).astype(np.int64) >> 24
    ),
    "shf.r.wrap.b32 %r2, %r0, %r1, 8": lambda x, y: x.view(np.uint32) >> 8 | y << 24,
    "prmt.b32 %r2, %r0, %r1, 0x5140": (  # bytes 0 and 1 of both, in turns
        lambda x, y: x & 255 | (y & 255) << 8 | (x >> 8 & 255) << 16 | (y >> 8) << 24
    ),
    "prmt.b32 %r2, %r0, %r1, 0xf83b": (  # signs, but for the third, which is byte 3 itself
        lambda x, y: (
            x >> 31 & 255 | (x >> 24 & 255) << 8 | (x << 24 >> 31 & 255) << 16 | y >> 31 << 24
        )
    ),
    "mov.u32 %r2, WARP_SZ": lambda x, y: x * 0 + 32,
    "cvt.s64.s32 %l0, %r0; popc.b64 %r2, %l0": lambda x, y: [
        f"{int(v) % 2**64:b}".count("1") for v in x
    ],
    "setp.lt.s32 %p0, %r0, %r1; selp.b32 %r2, %r0, %r1, %p0": np.minimum,
    "setp.hi.u32 %p0, %r0, %r1; selp.u32 %r2, 1, 0, %p0": (
        lambda x, y: x.view(np.uint32) > y.view(np.uint32)
    ),
    "setp.eq.s32 %p1, %r0, 7; setp.gt.or.s32 %p0, %r0, %r1, %p1; @!%p0 mov.u32 %r2, 9": (
        lambda x, y: np.where((x > y) | (x == 7), 0, 9)
    ),
    "cvt.u16.u32 %h0, %r0; cvt.s32.s16 %r2, %h0": lambda x, y: x.astype(np.int16),
    "cvt.rn.f32.s32 %f0, %r1; cvt.rzi.s32.f32 %r2, %f0": lambda x, y: y,
    "cvta.to.global.u64 %a3, %a0; ld.global.s8 %r2, [%a3]": lambda x, y: x.astype(np.int8),
    ".shared .align 4 .b8 cells[128]; mov.u64 %a3, cells; mad.wide.u32 %a3, %r3, 4, %a3;"
    "cvta.shared.u64 %l0, %a3; st.b32 [%l0], %r0; cvta.to.shared.u64 %a3, %l0;"
    "ld.shared.b32 %r2, [%a3]": lambda x, y: x,
    ".shared .align 4 .b8 pad[4]; .shared .align 4 .u32 cell; setp.eq.u32 %p0, %r3, 9;"
    "@%p0 st.shared.u32 [cell], %r0; bar.sync 0; ld.shared.u32 %r2, [cell]": (
        lambda x, y: x[TID * 0 + 9]
    ),
    "mov.b64 %l0, {%r0, %r1}; mov.b64 {%r3, %r2}, %l0": lambda x, y: y,
    "{ .reg .b32 %r2; mov.u32 %r2, 5; add.s32 %r0, %r0, %r2; } mov.u32 %r2, %r0": (
        lambda x, y: x + 5
    ),
    "bra skip; mov.u32 %r2, 3; skip: mov.u32 %r2, 4": lambda x, y: x * 0 + 4,
}
FLOAT = {
    "add.f32 %f2, %f0, %f1": lambda x, y: x + y,
    "sub.f32 %f2, %f0, %f1": lambda x, y: x - y,
    "mul.f32 %f2, %f0, 0f40000000": lambda x, y: x * 2,
    "div.rn.f32 %f2, %f0, %f1": lambda x, y: x / y,
    "fma.rn.f32 %f2, %f0, %f1, 0f3F800000": lambda x, y: x.astype(np.float64) * y + 1,
    "min.f32 %f2, %f0, %f1": np.fmin,
    "max.f32 %f2, %f0, %f1": np.fmax,
    "neg.f32 %f2, %f0": lambda x, y: -x,
    "abs.f32 %f2, %f0": lambda x, y: np.abs(x),
    "rcp.rn.f32 %f2, %f0": lambda x, y: 1 / x,
    "rsqrt.approx.f32 %f2, %f0": lambda x, y: x.astype(np.float64) ** -0.5,
    "ex2.approx.f32 %f2, %f0": lambda x, y: 2 ** x.astype(np.float64),
    "lg2.approx.f32 %f2, %f0": lambda x, y: np.log2(x.astype(np.float64)),
    "ex2.approx.ftz.f32 %f2, %f0": lambda x, y: 2 ** x.astype(np.float64),
    "mul.ftz.f32 %f2, %f0, 0f00000001": lambda x, y: x * 0,  # a subnormal number
    "mul.ftz.f32 %f2, %f0, 0f00800000": lambda x, y: np.where(np.abs(x) < 1, 0, x * 2.0**-126),
    "cvt.rn.f16x2.f32 %r0, %f0, %f1; mov.b32 {%h0, %h1}, %r0; cvt.f32.f16 %f2, %h1": (
        lambda x, y: x.astype(np.float16)
    ),
    "cvt.rn.bf16x2.f32 %r0, %f0, %f1; mov.b32 {%h0, %h1}, %r0; cvt.f32.bf16 %f2, %h0": (
        lambda x, y: bfloat(y)
    ),
    "setp.ltu.f32 %p0, %f0, %f1; selp.f32 %f2, %f0, %f1, %p0": lambda x, y: np.where(x >= y, y, x),
    "setp.ne.f32 %p0, %f0, %f1; selp.f32 %f2, 0f3F800000, 0f00000000, %p0": (
        lambda x, y: (x < y) | (x > y)
    ),
    "setp.nan.f32 %p0, %f0, %f1; selp.f32 %f2, 0f3F800000, 0f00000000, %p0": (
        lambda x, y: np.isnan(x) | np.isnan(y)
    ),
    "cvt.sat.f32.f32 %f2, %f0": lambda x, y: np.clip(np.nan_to_num(x), 0, 1),
    "cvt.f64.f32 %d0, %f0; mul.f64 %d0, %d0, 0d4000000000000000; cvt.rn.f32.f64 %f2, %d0": (
        lambda x, y: x * 2
    ),
    "cvt.rn.f16.f32 %h0, %f0; cvt.f32.f16 %f2, %h0": lambda x, y: x.astype(np.float16),
    "cvt.rn.bf16.f32 %h0, %f0; cvt.f32.bf16 %f2, %h0": lambda x, y: bfloat(x),
}
WARP = {
    "shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1": lambda x: x[TID ^ 1],
    "shfl.sync.up.b32 %r2|%p0, %r0, 3, 0, -1": lambda x: x[np.where(TID < 3, TID, TID - 3)],
    "shfl.sync.down.b32 %r2, %r0, 2, 6175, -1": (  # segments of 8: 24 << 8 | 31
        lambda x: x[np.where(TID % 8 < 6, TID + 2, TID)]
    ),
    "shfl.sync.idx.b32 %r2, %r0, 5, 31, -1": lambda x: x[TID * 0 + 5],
    "setp.gt.s32 %p0, %r0, 0; vote.sync.ballot.b32 %r2, %p0, -1": (
        lambda x: np.full(32, sum(int(v > 0) << i for i, v in enumerate(x)))
    ),
    "setp.gt.s32 %p0, %r0, 0; vote.sync.any.pred %p1, %p0, -1; selp.u32 %r2, 1, 0, %p1": (
        lambda x: np.full(32, (x > 0).any())
    ),
    "redux.sync.add.s32 %r2, %r0, -1": lambda x: np.full(32, x.sum(dtype=np.int32)),
    "redux.sync.max.u32 %r2, %r0, -1": lambda x: np.full(32, x.view(np.uint32).max()),
    "match.any.sync.b32 %r2, %r0, -1": (
        lambda x: [sum(int(a == b) << i for i, b in enumerate(x)) for a in x]
    ),
    "bar.warp.sync -1; mov.u32 %r2, %r0": lambda x: x,
    "setp.gt.s32 %p0, %r0, 0; bar.red.popc.u32 %r2, 0, %p0": lambda x: np.full(32, (x > 0).sum()),
    "setp.lt.u32 %p0, %r3, 16; @%p0 bra low; shfl.sync.bfly.b32 %r2, %r0, 2, 31, 0xffff0000;"
    "bra end; low: shfl.sync.bfly.b32 %r2, %r0, 1, 31, 0xffff; end: bar.sync 0": (
        lambda x: np.where(TID < 16, x[TID ^ 1], x[TID ^ 2])
    ),
}


def bfloat(x):
    """Round float32 to bfloat16, ties to even, through integer arithmetic of Python."""
    out = []
    for bits in np.asarray(x, np.float32).view(np.uint32):
        low, high = int(bits) & 0xFFFF, int(bits) >> 16
        up = low > 0x8000 or (low == 0x8000 and high & 1)
        out.append((high + up) << 16 if high & 0x7F80 != 0x7F80 or not low else high << 16)
    return np.array(out, np.uint32).view(np.float32)


@pytest.mark.parametrize("body", INTEGER)
def test_integer_instruction(body):
    with np.errstate(all="ignore"):
        expected = np.asarray(INTEGER[body](I32, J32)).astype(np.int64).astype(np.uint32)
    assert (apply(body, I32, J32, "u32", "u32") == expected).all()


@pytest.mark.parametrize("body", FLOAT)
def test_float_instruction(body):
    with np.errstate(all="ignore"):
        expected = np.asarray(FLOAT[body](F32, G32)).astype(np.float32)
    np.testing.assert_allclose(apply(body, F32, G32, "f32", "f32"), expected, rtol=3e-7)


@pytest.mark.parametrize("body", WARP)
def test_warp_instruction(body):
    expected = np.asarray(WARP[body](I32)).astype(np.int64).astype(np.uint32)
    assert (apply(body, I32, J32, "u32", "u32") == expected).all()


def test_64_bit_integers_and_doubles():
    x = np.array([1, -5, 2**40, -(2**62)] * 8)
    y = x[::-1].copy()
    assert (apply("add.s64 %l2, %l0, %l1", x, y, "u64", "s64") == x + y).all()
    assert (
        apply("mul.wide.s32 %l2, %r0, %r1", I32, J32, "u32", "s64") == I32.astype(int) * J32
    ).all()
    out = apply("fma.rn.f64 %d2, %d0, %d1, 0d3FF0000000000000", x / 7, y / 3, "f64", "f64")
    np.testing.assert_allclose(out, x / 7 * (y / 3) + 1, rtol=1e-15)


def test_atomics_run_one_after_the_other():
    body = """
      mov.u32 %r0, %tid.x; ld.param.u64 %a0, [x]; ld.param.u64 %a1, [y]; ld.param.u64 %a2, [z];
      atom.global.add.u32 %r1, [%a0], %r0; atom.global.max.s32 %r2, [%a0+4], %r0;
      atom.global.cas.b32 %r2, [%a0+8], 3, 77; atom.global.exch.b32 %r2, [%a0+12], %r0;
      atom.global.add.f32 %f0, [%a1], 0f3F000000; cvt.rn.f64.u32 %d0, %r0;
      mul.wide.u32 %a3, %r0, 4; add.s64 %a3, %a2, %a3; st.global.u32 [%a3], %r1; ret;
    """
    counts, total = np.array([5, -9, 3, 0], np.int32), np.zeros(1, np.float32)
    before = np.zeros(64, np.uint32)
    launch(kernel(body), 1, 64, counts, total, before)
    assert counts.tolist() == [5 + 63 * 32, 63, 77, 63]
    assert total == 32
    assert (before == 5 + np.cumsum(np.arange(64)) - np.arange(64)).all()


BROKEN = {
    "ld.param.u64 %a0, [x]; ld.global.u32 %r0, [%a0+128]; ret": r"read .* \+0 .* end of x",
    "ld.param.u64 %a0, [x]; st.global.u32 [%a0], 1; ret": "write to x, which is only read",
    "ld.param.u64 %a0, [y]; st.global.u32 [%a0+2], 1; ret": "misaligned write of 4 bytes",
    "st.shared.u32 [0], 1; ret": "out-of-bounds write",
    "mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 9; @%p0 bar.warp.sync -1; bar.sync 0; ret": (
        r"deadlock: .*bar.sync 0.* \(23 threads\)"
    ),
    "mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 9;"
    "@%p0 shfl.sync.idx.b32 %r1, %r0, 20, 31, 511; ret": "shuffle from a lane that does not",
    "shfl.sync.idx.b32 %r1, %r0, 0, 31, 511; ret": "a lane is not in its own mask",
    "mov.u32 %r0, 0; div.u32 %r1, 3, %r0; ret": "integer division by 0",
    "again: bra again": "no end after",
    "ld.param.u64 %a0, [x]; .shared .align 16 .b8 cells[16];"
    "cp.async.cg.shared.global [cells], [%a0], 16, 16; ret": "exit with copies",
    "ld.param.u64 %a0, [x]; .shared .align 16 .b8 cells[16];"
    "cp.async.cg.shared.global [cells], [%a0+128], 16, 16; ret": r"read .* \+0 .* end of x",
    ".shared .align 16 .b8 cells[16]; mov.u32 %r0, %tid.x;"
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1, %r2, %r3}, [%r0]; ret": (
        "misaligned read of 16 bytes"
    ),
    "mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 9; @%p0 ret;"
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r0]; ret": "a lane of the warp has exited",
}


@pytest.mark.parametrize("body", BROKEN)
def test_broken_kernel_is_reported(body):
    given = np.zeros(32, np.uint32)
    given.setflags(write=False)
    with pytest.raises(PtxError, match=BROKEN[body]):
        launch(kernel(body + ";"), 1, 32, given, *np.zeros((2, 32), np.uint32), limit=1000)


# a launch with 1 KiB of shared memory; each thread copies x to it
COPY = """
  ld.param.u64 %a0, [x]; mov.u32 %r0, %tid.x; shl.b32 %r0, %r0, 4; cvt.u64.u32 %a1, %r0;
  add.s64 %a0, %a0, %a1; ld.param.u64 %a2, [z]; add.s64 %a2, %a2, %a1;
  mov.u32 %r1, 16; mov.u32 %r2, %tid.x; setp.gt.u32 %p0, %r2, 30; @%p0 mov.u32 %r1, 0;
  cp.async.cg.shared.global [%r0], [%a0], 16, %r1; cp.async.commit_group;
"""
READ = "ld.shared.u32 %r3, [%r0+12]; st.global.u32 [%a2], %r3;"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (f"{COPY} cp.async.wait_group 0; {READ} ret;", [*range(3, 31 * 4, 4), 0]),
        (f"{COPY} cp.async.wait_group 1; {READ} cp.async.wait_group 0; ret;", [-1] * 32),
        (  # another copy, which stays
            f"{COPY} cp.async.cg.shared.global [%r0+512], [%a0], 16, %r1; cp.async.commit_group;"
            f"cp.async.wait_group 1; {READ} cp.async.wait_group 0; ret;",
            [*range(3, 31 * 4, 4), 0],
        ),
        (  # half of the threads wait
            f"{COPY} and.b32 %r3, %r2, 1; setp.eq.u32 %p1, %r3, 0; @%p1 cp.async.wait_group 0;"
            f"{READ} cp.async.wait_group 0; ret;",
            [3 + 4 * i if i % 2 == 0 else -1 for i in range(32)],
        ),
    ],
)
def test_asynchronous_copies_land_when_they_are_waited_for(body, expected):
    source, out = np.arange(31 * 4, dtype=np.int32), np.zeros((32, 4), np.int32)
    text = ".extern .shared .align 16 .b8 dynamic[];"
    declared = ".param .u64 x, .param .u64 z"
    module = Module(f"{text} .visible .entry test({declared}) {{ {REGISTERS} {body} }}")
    launch(module.kernels["test"], 1, 32, source, out, shared_bytes=1024)
    assert out[:, 0].tolist() == expected


def test_unknown_instruction_is_named():
    with pytest.raises(NotImplementedError, match=r"`sad\.u32"):
        launch(kernel("sad.u32 %r0, %r1, %r2, 12816; ret;"), 1, 32, *np.zeros((3, 32), np.int32))
