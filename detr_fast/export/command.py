# SPDX-License-Identifier: Apache-2.0
"""``tools/export.py``: a checkpoint as one file, compared with the model before it is kept."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detr_fast.command_line import Parser
from detr_fast.config import UsageError
from detr_fast.engine.log import say
from detr_fast.export.check import TOLERANCE, differences
from detr_fast.export.files import FORMS, OPSET, Exported, load, needed, write
from detr_fast.export.program import LEAST, OUTPUTS, Deployed, exported_program
from detr_fast.predict.detector import Detector

DESCRIPTION = """Write a trained model as one file that takes any number and size of images, and
compare what it says with what the model says on 15 batches before it is kept."""
EXTRAS = {".onnx": "onnx", ".pt2": "export"}


def parser(program: str) -> Parser:
    """The command line."""
    parser = Parser(prog=program, description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", help="a checkpoint, an https address, or the name of a published model")
    add("output", metavar="OUT", help="the file to write: .onnx or .pt2")
    forms = "; ".join(f"{name}: {text}" for name, text in FORMS.items())
    add("--to", choices=FORMS, default="", help=f"{forms} (default: onnx or export, as OUT ends)")
    add(
        "--raw",
        action="store_true",
        help="normalised float32 in, pred_logits and pred_boxes out (default: uint8 RGB in, "
        "scores, labels and corners out)",
    )
    add(
        "--padding",
        action="store_true",
        help="a second input, sizes, for images of unlike size in one batch",
    )
    add("--opset", type=int, default=OPSET, help="version of ONNX's operators (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1: where --to aoti runs (%(default)s)")
    add("--dilation", action="store_true", default=None, help="a DC5 file that does not say so")
    add("--overwrite", action="store_true", help="replace what is there")
    return parser


def run(options: argparse.Namespace) -> int:
    """Export; exit code 0, or 1 if the file differs from the model."""
    path = Path(options.output)
    form = _form(options.to, path)
    if options.opset < OPSET:
        raise UsageError(f"--opset {options.opset}: expected at least {OPSET}")
    if path.exists() and not options.overwrite:
        raise UsageError(f"{path} is there already: name another one, or give --overwrite")
    needed(form)
    detector = Detector.from_checkpoint(
        options.checkpoint, device=options.device, dilation=options.dilation
    )
    deployed = Deployed(detector.model, options.raw)
    about = describe(detector, options.raw, options.padding)
    say(f"{options.checkpoint}: tracing ...")
    program = exported_program(deployed, options.padding)
    trial = path.with_name(f"{path.stem}.unchecked{path.suffix}")
    try:
        say(f"{path}: {FORMS[form]} ...")
        write(Exported(program, options.raw, about), trial, form, opset=options.opset)
        equal = _compare(deployed, trial, form, options.padding)
        if equal:
            trial.replace(path)
    finally:
        trial.unlink(missing_ok=True)
    if not equal:
        say(f"{path} is not written: a difference above {TOLERANCE:g}")
        return 1
    say(f"{path} is written, {path.stat().st_size / 2**20:.1f} MiB")
    for name, text in about["inputs"].items():
        say(f"  {name}: {text}; {about['resize']}" if name == "images" else f"  {name}: {text}")
    say(f"  to {', '.join(about['outputs'])}; boxes are {about['boxes']}")
    return 0


def _form(told: str, path: Path) -> str:
    found = EXTRAS.get(path.suffix)
    if found is None or (told and (told == "onnx") != (found == "onnx")):
        raise UsageError(f"{path}: expected a name that ends in .onnx, or in .pt2 for the others")
    return told or found


def describe(detector: Detector, raw: bool, padding: bool) -> dict[str, Any]:
    """What one has to know to use the file; it is in the file, too."""
    images = "normalised float32" if raw else "RGB uint8"
    inputs = {"images": f"{images} (batch, 3, height, width), sides of {LEAST} pixels or more"}
    if padding:
        inputs["sizes"] = "int32 (batch, 2): height and width of each image, upper left"
    about: Mapping[str, Any] = {
        "inputs": inputs,
        "outputs": list(OUTPUTS[raw]),
        "boxes": "cxcywh as shares of the image" if raw else "x0 y0 x1 y1 as shares of the image",
        "resize": f"short side {detector.image_size} pixels, long side at most "
        f"{detector.image_size * 1333 // 800}, bilinear, antialiased",
        "class_names": detector.class_names,
        "category_ids": detector.category_ids,
    }
    return dict(about)


def _compare(deployed: Deployed, path: Path, form: str, padding: bool) -> bool:
    say("batch  height x width   " + ("logits" if deployed.raw else "scores") + "     boxes")
    equal = True
    for found in differences(deployed, load(path, form), padding):
        size = f"{found.height} x {found.width}"
        verdict = "" if found.equal else "  differs"
        say(f"{found.batch:5d}  {size:>14}   {found.values:.1e}   {found.boxes:.1e}{verdict}")
        equal = equal and found.equal
    return equal
