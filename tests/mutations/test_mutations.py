# SPDX-License-Identifier: Apache-2.0
"""The generator of mutants, and (long) that the checks notice every one of them."""

from collections import Counter

import pytest

from tests.cudasim import simulated
from tests.cudasim.build import CSRC
from tests.mutations import mutate_kernels
from tests.mutations.checks import failure
from tests.mutations.mutants import Mutant, mutants_of
from tests.mutations.subjects import SUBJECTS

SOURCE = """\
#include <vector>
#define TWICE(x) (2 * (x))
// a < b, [0] and "1 + 1" in comments stay as they are
static_assert(sizeof(int) == 4);  // true in every mutant, or there is none
template <typename T>
__global__ void f_kernel(const T* __restrict__ in, T* out, int n) {
  __shared__ T sums[2][4];
  float rest[4] = {}, one;
  const int i = threadIdx.x % 32;
  if (i >= n && !done) return;
  sums[0][i] += -in[i] * T(0.5);
  __syncthreads();
  wait_for_copies<0>();
  slot ^= 0xffu & ~mask;
  out[i] = larger(in[i], T(0));
}
"""
CHANGES = {
    "barrier": ["`__syncthreads()` -> ``", "`wait_for_copies<0>()` -> ``"],
    "comparison": ["`>=` -> `>`"],
    "constant": [
        "`4` -> `5`",
        "`32` -> `33`",
        "`0` -> `1`",
        "`0.5` -> `1.5`",
        "`0` -> `1`",
        "`0xffu` -> `0x100u`",
        "`0` -> `1`",
    ],
    "index": [
        "`threadIdx.x` -> `(threadIdx.x + 1)`",
        "`0` -> `0 + 1`",
        *["`i` -> `i + 1`"] * 4,
    ],
    "operator": [
        "`%` -> `/`",
        "`&&` -> `||`",
        "`!` -> ``",
        "`+=` -> `-=`",
        "`-` -> ``",
        "`*` -> `/`",
        "`^=` -> `|=`",
        "`&` -> `|`",
        "`~` -> ``",
    ],
    "call": ["`larger` -> `smaller`"],
}


@pytest.fixture
def mutants(tmp_path):
    path = tmp_path / "f_kernels.cu"
    path.write_text(SOURCE)
    return mutants_of(path)


def test_every_place_is_changed_once(mutants):
    for kind, expected in CHANGES.items():
        found = [m.change for m in mutants if m.kind == kind and "sums[2]" not in m.text]
        assert found == expected, kind


def test_mutant_differs_in_its_line_alone(mutants):
    for mutant in mutants:
        lines = [
            (number, new)
            for number, (old, new) in enumerate(
                zip(SOURCE.splitlines(), mutant.source().splitlines(), strict=True), 1
            )
            if old != new
        ]
        assert [number for number, _ in lines] == [mutant.line]
        assert mutant.new in lines[0][1]
    assert max(Counter(m.key for m in mutants).values()) == 1


def test_listed_mutants_exist():
    known = {mutant.key for subject in SUBJECTS.values() for mutant in subject.mutants()}
    stale = set(mutate_kernels.equivalents()) - known
    assert not stale, "no mutant of the sources reads like this: remove it from equivalent.txt"


def test_sample_takes_even_distances_and_only_takes_a_line():
    mutants = [Mutant(CSRC / "a.h", 0, "1", "2", "constant", n, "", 1) for n in range(100)]
    assert [m.line for m in mutate_kernels.chosen(mutants, None, 4)] == [0, 25, 50, 75]
    assert [m.line for m in mutate_kernels.chosen(mutants, "csrc/a.h:7", None)] == [7]
    assert not mutate_kernels.chosen(mutants, "b.h", None)


@pytest.mark.usefixtures("needs_simulator")
@pytest.mark.parametrize("subject", SUBJECTS)
def test_sources_pass_every_check(subject):
    """Also what no other test asks: limits of 32 bits, and no copy of tensors that lie well."""
    checks = SUBJECTS[subject].checks()
    with simulated():
        reasons = [reason for check in checks if (reason := failure(check))]
    assert not reasons, reasons[0]


@pytest.mark.long
@pytest.mark.usefixtures("needs_simulator")
@pytest.mark.parametrize(
    "arguments", [["--subject=boxes"], ["--subject=attention", "--sample=120"]]
)
def test_checks_notice_every_mutant(arguments, capsys):
    status = mutate_kernels.main(arguments)
    assert status == 0, capsys.readouterr().out
