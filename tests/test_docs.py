# SPDX-License-Identifier: Apache-2.0
"""What README and docs/ tell people to type works: Python blocks, command lines, YAML."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from detr_fast import convert
from detr_fast.cli import COMMANDS
from detr_fast.command_line import parse
from detr_fast.engine.profile import FLAGS
from detr_fast.export import command as export_command
from detr_fast.predict import command as predict_command
from detr_fast.report import command as report_command
from tests.predict.conftest import checkpoint, scene  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TOOLS = {
    "train": "train",
    "eval": "eval",
    "predict": "predict",
    "convert_checkpoint": "convert",
    "export": "export",
    "report": "report",
    "profile_step": "profile",
}
OWN_PARSERS = {"predict": predict_command, "convert": convert, "export": export_command}


def blocks(page, language):
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def command_lines():
    """Every call of a tool, as words, with the page that it stands on."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split("#")[0].split("&&"):
                    words = shlex.split(part)
                    if words[:2] == ["uv", "run"] and words[2].startswith("tools/"):
                        yield page.name, TOOLS[Path(words[2]).stem], words[3:]
                    elif words[:1] == ["detr-fast"]:
                        yield page.name, words[1], words[2:]


@pytest.mark.parametrize(("page", "command", "words"), list(command_lines()))
def test_command_lines_are_understood(page, command, words):
    assert command in COMMANDS
    if command in OWN_PARSERS:
        OWN_PARSERS[command].parser(command).parse_args(words)
    else:
        if "--config" in words:  # the file is that of the YAML block, whose flags are tried below
            words = [w for w in words if w != "--config" and not w.endswith(".yaml")]
        more = {"profile": FLAGS, "report": report_command.FLAGS}
        parse(command, "", words, more.get(command, {}))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda p: p.name)
def test_files_of_flags_are_understood(page, tmp_path):
    for block in blocks(page, "yaml"):
        (file := tmp_path / "run.yaml").write_text(block)
        assert parse("train", "", ["--config", str(file)])


def test_all_pages_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in PAGES[1:] if page.name not in navigation] == []


# what a page takes for granted: variables of the code that its blocks are pasted into
GIVEN = {
    "attention.md": """
import torch, detr_fast
q, k, v = torch.randn(3, 2, 8, 25 * 34, 32)
sizes = torch.tensor([[800, 1066], [608, 950]], dtype=torch.int32)
""",
    "criterion.md": """
import torch, detr_fast
logits = torch.randn(6, 2, 10, 92, requires_grad=True)
boxes = (torch.rand(6, 2, 10, 4) / 2 + 0.25).requires_grad_()
layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes)]
outputs = layers[-1] | {"aux_outputs": layers[:-1]}
one = {"labels": torch.tensor([3, 17]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]] * 2)}
targets = detr_fast.Targets.from_list([one, one])
""",
    "export.md": """
from detr_fast.cli import export
for name in ("model.onnx", "model.pt2"):
    assert export(["outputs/shapes/checkpoint.pth", name]) == 0
""",
    "matcher.md": """
import torch
from types import SimpleNamespace
model = lambda pixel_values, labels: SimpleNamespace(loss=0)
pixel_values = labels = None
logits, boxes = torch.randn(6, 2, 10, 91), torch.rand(6, 2, 10, 4) / 2 + 0.25
one = {"labels": torch.tensor([3, 17]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]] * 2)}
targets = [one, one]
""",
}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, checkpoint, scene):  # noqa: F811
    """The blocks of a page one after the other, where the files are that they speak of.

    In a process of their own, as some change an installed library.
    """
    (tmp_path / "outputs" / "shapes").mkdir(parents=True)
    (tmp_path / "outputs" / "shapes" / "checkpoint.pth").write_bytes(checkpoint.read_bytes())
    Image.fromarray(scene).save(tmp_path / "photo.jpg")
    code = "\n".join([GIVEN.get(page.name, ""), *blocks(page, "python")])
    (tmp_path / "page.py").write_text(code)
    run = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "py")], ids=lambda p: p.name)
def test_fragments_are_python(page):
    """``py`` marks lines that go into a file of another code base."""
    for block in blocks(page, "py"):
        compile(block, page.name, "exec")
