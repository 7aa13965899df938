# SPDX-License-Identifier: Apache-2.0
"""What a user meets at import, and the promises of the source tree."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import detr_fast

ROOT = Path(__file__).resolve().parents[1]
NOT_CORE = ("torchvision", "scipy", "matplotlib", "PIL", "hotcoco", "pycocotools", "tqdm")
SOURCES = sorted(
    path
    for folder in ("csrc", "detr_fast", "tools", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
)


def run_python(code, **options):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_import_without_compiled_part_names_the_remedy(tmp_path):
    package = Path(detr_fast.__file__).parent
    shutil.copytree(package, tmp_path / "detr_fast", ignore=shutil.ignore_patterns("*.so"))
    # without site: an editable install would lend its compiled part
    environment = {**os.environ, "PYTHONPATH": str(Path(torch.__file__).parents[1])}
    command = [sys.executable, "-S", "-c", "import detr_fast"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "ImportError: the compiled part of detr_fast does not load" in result.stderr
    assert "`uv sync`" in result.stderr


def test_core_imports_without_the_extra_train():
    """With CPU-only torch there is no torchvision: all but data, engine and pictures works."""
    code = f"""
import sys
for name in {NOT_CORE}:
    sys.modules[name] = None  # importing it raises ImportError
import detr_fast, detr_fast.reference, detr_fast.matcher, detr_fast.criterion, detr_fast.models
model = detr_fast.detr_resnet50()
print(sum(p.numel() for p in model.parameters() if p.requires_grad))
import detr_fast.cli
print(detr_fast.cli.train(["--epochs", "1", "--output_dir", ""]))
"""
    result = run_python(code)
    assert result.stdout.splitlines()[0] == "41302368", result.stderr
    assert result.stdout.splitlines()[-1] == "2"
    remedy = 'pip install "detr-fast[train]"'
    assert remedy in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_public_names_are_documented():
    for name in detr_fast.__all__:
        assert getattr(detr_fast, name).__doc__, name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_file_has_its_licence_and_one_subject(path):
    text = path.read_text()
    assert (
        text.splitlines()[0][2:].strip().removeprefix(" ") == "SPDX-License-Identifier: Apache-2.0"
    )
    limit = 500 if path.suffix in (".cu", ".cuh") else 400
    assert len(text.splitlines()) <= limit


@pytest.fixture
def setup_py():
    return runpy.run_path(str(ROOT / "setup.py"))


def fake_toolkit(folder, release):
    """A folder that looks like a CUDA toolkit of this release."""
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include/cuda_runtime.h").touch()
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return folder


def test_cuda_decision(setup_py, tmp_path, monkeypatch):
    decide = setup_py["cuda_home"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "fits", "13.2")))
    monkeypatch.delenv("DETR_FAST_CUDA", raising=False)
    assert decide() == (tmp_path / "fits", "with CUDA 13.2")
    monkeypatch.setenv("DETR_FAST_CUDA", "0")
    assert decide() == (None, "without CUDA: DETR_FAST_CUDA=0")
    monkeypatch.setenv("DETR_FAST_CUDA", "")
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "old", "12.8")))
    assert decide()[1] == f"without CUDA: torch needs CUDA 13.0, {tmp_path / 'old'} is 12.8"
    monkeypatch.setenv("DETR_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match=r"DETR_FAST_CUDA=1, but torch needs CUDA 13\.0"):
        decide()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit, match=r"DETR_FAST_CUDA=1, but torch .* has none"):
        decide()


def test_incomplete_toolkit_is_not_taken(setup_py, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("DETR_FAST_CUDA", raising=False)
    folder = fake_toolkit(tmp_path / "wheel", "13.0")
    (folder / "include/cuda_runtime.h").unlink()
    monkeypatch.setenv("CUDA_HOME", str(folder))
    assert setup_py["cuda_home"]() == (None, "without CUDA: no toolkit found, see CUDA_HOME")


def test_toolkit_is_found_behind_a_wrapper(setup_py, tmp_path, monkeypatch):
    real = fake_toolkit(tmp_path / "real", "13.0")
    wrapper = tmp_path / "bin/nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f"#!/bin/sh\necho '#$ TOP={real}' >&2\n")
    wrapper.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=os.pathsep)
    assert next(iter(setup_py["toolkits"]())) == real


def test_version_is_that_of_the_metadata():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', pyproject, re.MULTILINE)[1] == detr_fast.__version__
