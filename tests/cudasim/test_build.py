# SPDX-License-Identifier: Apache-2.0
"""The cache of compiled kernels: right after a change, whole beside another run."""

import multiprocessing

import pytest

from tests.cudasim import build, simulate


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    """A folder of sources with a cache of its own."""
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/answer.h").write_text("constexpr int answer = 42;\n")
    (tmp_path / "csrc/kernel.cu").write_text(
        '#include "answer.h"\nint reply() { return answer; }\n'
    )
    return tmp_path / "csrc"


def compiled(csrc, check=True):
    (target,) = build.compile_all([csrc / "kernel.cu"], csrc, [], check)
    return target


def test_object_is_compiled_once_until_a_header_or_a_flag_changes(csrc):
    first = compiled(csrc)
    written = first.stat().st_mtime_ns
    assert compiled(csrc) == first
    assert first.stat().st_mtime_ns == written
    assert compiled(csrc, check=False) != first
    (csrc / "answer.h").write_text("constexpr int answer = 43;\n")
    assert compiled(csrc) != first


def test_compile_error_is_told_and_leaves_no_object(csrc):
    (csrc / "kernel.cu").write_text("int reply() { return answer; }\n")
    with pytest.raises(RuntimeError, match=r"answer\W+was not declared"):
        compiled(csrc)
    assert not list(build.CACHE.glob("kernel-*.o"))


def _compile_and_report(csrc, results):
    try:
        results.put(compiled(csrc).stat().st_ino)
    except Exception as error:  # the parent has to hear of any
        results.put(repr(error))


def test_processes_share_one_build(csrc):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_compile_and_report, args=(csrc, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    inodes = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert inodes == {compiled(csrc).stat().st_ino}


@pytest.mark.parametrize(
    ("machine", "system", "reason"),
    [
        ("x86_64", "Linux", ""),
        ("aarch64", "Linux", "not for aarch64 Linux"),
        ("x86_64", "Darwin", "not for x86_64 Darwin"),
    ],
)
def test_other_platforms_are_named(monkeypatch, machine, system, reason):
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    monkeypatch.setattr(build.platform, "system", lambda: system)
    assert bool(build.unsupported()) == bool(reason)
    assert build.unsupported().endswith(reason)


@pytest.mark.usefixtures("needs_simulator")
def test_process_keeps_to_the_library_it_has_loaded(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("built again")

    with simulate.simulated():
        pass
    monkeypatch.setattr(simulate, "library", refuse)
    with simulate.simulated(schedule="reverse"):
        pass
    with pytest.raises(RuntimeError, match="built again"), simulate.simulated(check=False):
        pass
