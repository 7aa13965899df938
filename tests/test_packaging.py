# SPDX-License-Identifier: Apache-2.0
"""What a user meets at import."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import detr_fast


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
