# SPDX-License-Identifier: Apache-2.0
"""What patch() swaps, and that it takes everything back."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from detr_fast.matcher import Patch, patch
from detr_fast.matcher import detrex as ours


class Theirs(torch.nn.Module):
    """A stand-in for the matcher of detrex."""

    def forward(self, outputs, targets):
        return "theirs"


@pytest.fixture
def detrex(monkeypatch):
    """An installed detrex whose matcher is ``Theirs``, as far as patch() can see."""
    matcher = type("HungarianMatcher", (Theirs,), {"forward": Theirs.forward})
    path, parent = "", None
    for part in ("detrex", "modeling", "matcher", "matcher"):
        path = f"{path}.{part}".strip(".")
        module = ModuleType(path)
        module.__spec__ = type("Spec", (), {"name": path})()
        module.__path__ = []
        monkeypatch.setitem(sys.modules, path, module)
        if parent is not None:
            setattr(parent, part, module)
        parent = module
    sys.modules["detrex"].__version__ = "0.9"
    parent.HungarianMatcher = matcher
    return parent


def test_swaps_and_takes_back(detrex):
    existing, cls = detrex.HungarianMatcher(), detrex.HungarianMatcher
    with patch("detrex") as patched:
        assert isinstance(patched, Patch)
        assert repr(patched) == "Patch('detrex': HungarianMatcher.forward)"
        assert detrex.HungarianMatcher is cls
        assert type(existing).forward is ours.HungarianMatcher.forward
    assert existing(None, None) == "theirs"
    assert repr(patched) == "Patch('detrex': nothing swapped)"


def test_takes_back_after_an_error_and_only_once(detrex):
    with pytest.raises(ZeroDivisionError), patch("detrex") as patched:
        raise ZeroDivisionError
    again = patch("detrex")
    patched.undo()
    assert detrex.HungarianMatcher.forward is ours.HungarianMatcher.forward
    again.undo()
    assert detrex.HungarianMatcher.forward is Theirs.forward


def test_a_second_patch_leaves_the_first_alone(detrex):
    with patch("detrex"):
        with patch("detrex") as second:
            assert repr(second) == "Patch('detrex': nothing swapped)"
        assert detrex.HungarianMatcher.forward is ours.HungarianMatcher.forward
    assert detrex.HungarianMatcher.forward is Theirs.forward


def test_refuses_a_matcher_with_other_arguments(detrex):
    detrex.HungarianMatcher.forward = lambda self, outputs, targets, epoch: "theirs"
    with pytest.raises(RuntimeError, match=r"detrex 0\.9 has the arguments \(self, .*, epoch\)"):
        patch("detrex")


def test_names_what_it_looked_for(detrex):
    del detrex.HungarianMatcher
    with pytest.raises(RuntimeError, match=r"detrex 0\.9 has none .* modeling\.matcher\.matcher"):
        patch("detrex")


@pytest.mark.parametrize(
    ("library", "error", "message"),
    [
        ("yolo", ValueError, "transformers, rfdetr, .*, got 'yolo'"),
        ("maskdino", ImportError, "maskdino is not installed here"),
    ],
)
def test_refuses_libraries_that_are_not_there(library, error, message):
    with pytest.raises(error, match=message):
        patch(library)


def test_names_a_dependency_that_is_missing(tmp_path, monkeypatch):
    folder = tmp_path / "maskdino" / "modeling"
    folder.mkdir(parents=True)
    (folder / "matcher.py").write_text("import a_dependency_of_maskdino")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(ImportError, match=r"maskdino\.modeling\.matcher .* a_dependency_of_m"):
            patch("maskdino")
        (folder / "matcher.py").unlink()
        with pytest.raises(RuntimeError, match="has none of the matchers known here"):
            patch("maskdino")
    finally:
        for name in ("maskdino", "maskdino.modeling"):
            sys.modules.pop(name, None)


def test_reaches_every_matcher_of_transformers():
    loss = pytest.importorskip("transformers.loss.loss_utils")
    with patch("transformers") as patched:
        names = repr(patched)
    assert loss  # the losses of all models are looked up here
    root = Path(sys.modules["transformers"].__file__).parent
    installed = {
        name
        for file in [*root.glob("loss/*.py"), *root.glob("models/*/modeling_*.py")]
        for name in re.findall(r"^class (\w*HungarianMatcher)\b", file.read_text("utf-8"), re.M)
    }
    assert len(installed) > 8
    # MaskFormer compares whole masks, for which there is no matcher of ours
    assert set(re.findall(r" (\w+)\.forward", names)) == installed - {"MaskFormerHungarianMatcher"}
    from transformers.loss.loss_for_object_detection import HungarianMatcher

    assert HungarianMatcher.forward.__module__.startswith("transformers")
