# SPDX-License-Identifier: Apache-2.0
"""Guards the guard: kernels broken on purpose must be reported, and correct ones must not."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.cudasim import SCHEDULES, load_test_kernels, scheduled

pytestmark = pytest.mark.usefixtures("needs_simulator")
KERNELS = Path(__file__).parent / "kernels"
SOURCES = (KERNELS / "selfcheck.cu", KERNELS / "selfcheck_mma.cu")
THREAD = r"thread \(\d+,0,0\) \[warp \d lane \d+\] of block \(\d,0,0\)"
UPDATES, DYNAMIC, TWO_BLOCKS = {"updates": True}, {"shared_bytes": 256}, {"grid": (2, 1, 1)}
ROWS = {"shared_bytes": 1024}  # 64 of 16 bytes

# what the report says before it names thread, file and line
FAULTS = {
    "missing_syncthreads": (r"race on shared array staged\+\d+: .* no barrier", {}),
    "missing_second_syncthreads": (r"race on shared array staged\+\d+: .* no barrier", {}),
    "missing_syncwarp": (r"race on shared array staged\+\d+: .* no barrier", {}),
    "missing_second_syncwarp": (r"race on shared array staged\+\d+: .* no barrier", {}),
    "syncwarp_across_warps": (r"race on shared array staged\+\d+: .* no barrier", {}),
    "shuffle_orders_nothing": (r"race on shared array staged\+\d+: .* no barrier", {}),
    "two_writers": (r"race on output 1\+\d+: write .* and write", {}),
    "plain_access_beside_atomics": (r"race on output 1\+0: ", UPDATES),
    "race_between_blocks": (r"race between blocks on output 1\+0: ", UPDATES | TWO_BLOCKS),
    "shuffle_from_missing_lane": ("lane 0 reads lane 20, which takes no part", {}),
    "lane_not_in_its_mask": ("__shfl_sync by a lane that is not in its mask", {}),
    "divergent_collectives": ("divergent warp: other lanes of its mask wait in", {}),
    "divergent_barrier": ("divergent barrier: others wait in __syncthreads at", {}),
    "early_return_before_barrier": ("__syncthreads without|exit of a thread that others", {}),
    "early_return_before_shuffle": ("lanes that have exited|exit of a thread that its warp", {}),
    "deadlock": ("deadlock: no thread can run; .* wait in __sync", {}),
    "spin_wait": ("endless loop or spin wait", UPDATES),
    "endless_loop": ("endless loop", {}),
    "read_before_wait": (r"read too early of shared array rows\+\d+", {}),
    "wait_without_commit": (r"read too early of shared array rows\+\d+", {}),
    "wait_for_too_few": (r"read too early of shared array others\+\d+", {}),
    "no_barrier_after_wait": (r"race on shared array rows|too early of shared array rows", {}),
    "barrier_before_wait": (r"race on shared array rows|too early of shared array rows", {}),
    "write_under_a_copy": ("write to where an asynchronous copy was on its way to", {}),
    "exit_before_copies_have_landed": ("exit with 1 asynchronous copies that were not", {}),
    "exit_with_uncommitted_copies": ("exit with 1 asynchronous copies that were not", {}),
    "misaligned_copy": ("misaligned asynchronous copy of 16 bytes", {}),
    "copy_past_input": (r"out-of-bounds read of 16 bytes, input 0\+256 of 256 bytes", {}),
    "copy_past_shared": (r"write of 16 bytes, dynamic shared memory\+1024", ROWS),
    "copy_to_global": (r"write of output 1\+\d+ as shared memory", {}),
    "copy_to_local": ("write of local memory as shared memory", {}),
    "stage_still_read": (r"race on shared array stages\+\d+|too early of shared array stages", {}),
    "load_before_wait": (r"read too early of shared array rows\+\d+", {}),
    "load_without_barrier": (r"race on shared array rows\+\d+: .* no barrier", {}),
    "load_orders_nothing": (r"race on shared array rows\+\d+: .* no barrier", {}),
    "misaligned_row": ("load_matrices of a row that is not on a 16-byte boundary", {}),
    "row_past_shared": (r"read of 16 bytes, dynamic shared memory\+1024", ROWS),
    "row_uninitialised": (r"read of uninitialised shared array rows\+144", {}),
    "row_in_global": (r"read of input 0\+\d+ as shared memory", {}),
    "divergent_products": ("divergent warp: other lanes of its mask wait in multiply_add", {}),
    "product_of_half_a_warp": ("deadlock: .* 32 wait in multiply_add", {}),
    "product_of_a_partial_warp": (
        "multiply_add without all lanes of its warp",
        {"block": (40, 1, 1)},
    ),
    "read_past_input": (r"out-of-bounds read of 4 bytes, input 0\+256 of 256 bytes", {}),
    "write_past_output": (r"out-of-bounds write of 4 bytes, output 1\+256 of 256 bytes", {}),
    "cached_read_past_input": (r"out-of-bounds read of 4 bytes, input 0\+256", {}),
    "atomic_past_output": (r"out-of-bounds write of 4 bytes, output 1\+256", UPDATES),
    "read_before_input": ("out-of-bounds read of 4 bytes", {}),
    "read_past_static_shared": ("array index out of bounds", {}),
    "write_past_static_shared": ("array index out of bounds", {}),
    "read_past_dynamic_shared": (r"read of 4 bytes, dynamic shared memory\+256", DYNAMIC),
    "write_past_dynamic_shared": (r"write of 4 bytes, dynamic shared memory\+256", DYNAMIC),
    "vector_past_dynamic_shared": (
        r"read of 16 bytes, dynamic shared memory\+240 of 248 bytes",
        {"shared_bytes": 248},
    ),
    "static_shared_uninitialised": (r"read of uninitialised shared array staged\+28", {}),
    "dynamic_shared_uninitialised": ("read of uninitialised dynamic shared memory", DYNAMIC),
    "shared_of_another_block": ("read of uninitialised shared array staged", TWO_BLOCKS),
    "output_uninitialised": ("read of uninitialised output 1", {}),
    "output_not_written": ("4 bytes of output 1 were never written", {}),
    "write_to_input": (r"write to the read-only input 0\+\d+", {}),
    "misaligned_vector": ("misaligned", {}),
    "local_memory_of_another_thread": ("read of another thread's local memory", {}),
    "null_pointer": ("null pointer: read of 4 bytes", {}),
    "wild_pointer": ("out-of-bounds read of 4 bytes", {}),
    "too_much_local_memory": ("stack overflow: more than 256 KiB of local memory", {}),
    "index_overflow": (r"integer overflow in \*", {}),
    "shift_out_of_range": ("shift out of range", {}),
    "division_by_zero": ("division by zero", {}),
    "conversion_out_of_range": ("conversion to integer out of range", {}),
}
LAUNCHES = {
    "too_many_threads": (r"a block \(32,33,1\) is not of 1 to 1024", {"block": (32, 33, 1)}),
    "no_threads": (r"a block \(0,1,1\) is not of 1 to 1024", {"block": (0, 1, 1)}),
    "no_blocks": (r"a grid \(0,1,1\) is not within", {"grid": (0, 1, 1)}),
    "too_tall_grid": (r"a grid \(1,65536,1\) is not within", {"grid": (1, 65536, 1)}),
}
WITHOUT = "limit 49152 without DETR_FAST_ALLOW_SHARED"
# kernel, dynamic shared memory, what the report says
SHARED = {
    "dynamic alone": ("fine", 49153, f"49153 bytes of shared memory, {WITHOUT}"),
    "static and dynamic": (
        "static_and_dynamic_shared",
        49152 - 255,
        f"49153 bytes of shared memory, {WITHOUT}",
    ),
    "more than allowed": (
        "opted_in",
        100001,
        "100001 bytes of dynamic shared memory, limit 100000 of DETR_FAST_ALLOW_SHARED",
    ),
    "more than there is": ("opted_in", 232449, "232449 bytes of shared memory, limit 232448"),
}
CORRECT = {
    "with_syncthreads": {},
    "with_syncwarp": {},
    "copies_in_order": {},
    "stage_no_longer_read": {},
    "atomics_then_barrier": UPDATES,
    "atomics_between_blocks": UPDATES | TWO_BLOCKS,
    "shuffle_within_mask": {},
    "whole_warp_returns_early": {},
    "aligned_vector": {},
    "static_and_dynamic_shared": {"shared_bytes": 49152 - 256},
    "opted_in": {"shared_bytes": 100000},
    "fine": {},
}
# what needs no checker: the processor, the scheduler or the watchdog sees it
FAST = {
    "null_pointer": "Segmentation fault, address \\(nil\\)",
    "wild_pointer": "Segmentation fault, address 0x",
    "division_by_zero": "division by zero",
    "too_much_local_memory": "stack overflow",
    "shuffle_from_missing_lane": "lane 0 reads lane 20",
    "deadlock": "deadlock",
    "exit_before_copies_have_landed": "exit with 1 asynchronous copies",
    "misaligned_copy": "misaligned asynchronous copy",
    "misaligned_row": "not on a 16-byte boundary",
    "product_of_half_a_warp": "deadlock",
    "endless_loop": "endless loop",
    "spin_wait": "endless loop",
}


def load_kernels(check=True):
    for source in SOURCES:
        load_test_kernels(source, check)


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    load_kernels()
    return request.param


def launch(name, settings, grid=(1, 1, 1), block=(64, 1, 1), **options):
    values = None if name == "null_pointer" else np.arange(64, dtype=np.int32)
    with scheduled(**settings) as simulator:
        out = np.zeros(64 * grid[0] or 1, np.int32)
        simulator.launch(name, grid, block, values, out, **options)
        return out


def place_of(kernel):
    """A pattern of file and line of a kernel's fault; of any line where none is marked."""
    for source in SOURCES:
        lines = source.read_text().splitlines()
        for start, line in enumerate(lines):
            if f"SELFCHECK({kernel})" in line:
                end = start if "}" in line else lines.index("}", start)
                marked = [i for i in range(start, end + 1) if "// FAULT" in lines[i]]
                return rf"{source.name}:" + (rf"{marked[0] + 1}\b" if marked else r"\d+")
    raise AssertionError(f"no source has {kernel}")


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_reported(schedule, fault):
    report, options = FAULTS[fault]
    settings = {"schedule": schedule, "watchdog_seconds": 0.05}
    with pytest.raises(RuntimeError, match=report) as error:
        launch(fault, settings, **options)
    message = str(error.value)
    assert message.startswith(f"cudasim: launch of {fault}: ")
    if fault != "output_not_written":  # nobody did it anywhere
        assert re.search(place_of(fault), message), f"{place_of(fault)} in {message}"
        assert re.search(THREAD, message)
        assert "at offset" not in message  # every place has its line


@pytest.mark.parametrize("kernel", CORRECT)
def test_correct_kernel_passes_under_any_schedule(schedule, kernel):
    for seed in range(50 if schedule == "random" else 1):
        preemption = 0.1 if schedule == "random" else 0
        settings = {"schedule": schedule, "seed": seed, "preemption": preemption}
        launch(kernel, settings, **{"updates": True, **CORRECT[kernel]})


@pytest.mark.parametrize("kernel", ["early_return_before_barrier", "early_return_before_shuffle"])
def test_early_return_is_allowed_where_asked_for(schedule, kernel):
    launch(kernel, {"schedule": schedule, "strict": False})


@pytest.mark.parametrize("case", LAUNCHES)
def test_launch_is_refused(schedule, case):
    report, options = LAUNCHES[case]
    with pytest.raises(RuntimeError, match=f"cudasim: launch of fine: .*{report}"):
        launch("fine", {"schedule": schedule}, **options)


@pytest.mark.parametrize("case", SHARED)
def test_too_much_shared_memory_is_refused(schedule, case):
    kernel, shared_bytes, report = SHARED[case]
    with pytest.raises(RuntimeError, match=f"cudasim: launch of {kernel}: {report}"):
        launch(kernel, {"schedule": schedule}, shared_bytes=shared_bytes)


def test_shared_memory_of_a_smaller_device():
    load_kernels()
    with pytest.raises(RuntimeError, match="100256 bytes of shared memory, limit 100255"):
        launch("opted_in", {"max_shared_bytes": 100255}, shared_bytes=100000)
    with pytest.raises(RuntimeError, match="100000 bytes of shared memory, limit 99999"):
        launch("opted_in", {"max_shared_bytes": 99999}, shared_bytes=256)  # it allowed too much
    with pytest.raises(ValueError, match="expected at most 232448, got 232449"):
        launch("opted_in", {"max_shared_bytes": 232449}, shared_bytes=100000)


@pytest.mark.parametrize("fault", FAST)
def test_fast_build_reports_what_stops_it(fault):
    load_kernels(check=False)
    with pytest.raises(RuntimeError, match=FAST[fault]) as error:
        launch(fault, {"watchdog_seconds": 0.05}, check=False)
    assert re.search(THREAD, str(error.value))
    assert re.search(place_of(fault), str(error.value))


def test_fast_build_finds_writes_past_dynamic_shared_memory():
    load_kernels(check=False)
    with pytest.raises(RuntimeError, match="0 bytes past the end of dynamic shared memory"):
        launch("write_past_dynamic_shared", {}, shared_bytes=256, check=False)


def test_fast_build_poisons_shared_memory_of_every_block():
    load_kernels(check=False)
    options = {"check": False, "updates": True}
    assert (launch("dynamic_shared_uninitialised", {}, shared_bytes=256, **options) == -1).all()
    assert (launch("shared_of_another_block", {}, **TWO_BLOCKS, **options)[64:] == -1).all()


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="expected forward, reverse or random, got sideways"):
        launch("fine", {"schedule": "sideways"})


def test_reports_are_kept_until_the_next_launch(schedule):
    with scheduled(schedule) as simulator:
        with pytest.raises(RuntimeError, match="race"):
            launch("missing_second_syncthreads", {"schedule": schedule})
        assert len(simulator.reports()) == 1
        before = simulator.counts()
        launch("with_syncthreads", {"schedule": schedule})
        assert simulator.reports() == []
        gained = {name: count - before[name] for name, count in simulator.counts().items()}
        assert gained["launches"] == 1
        assert gained["barriers"] == 6
        assert gained["exits"] == 64
