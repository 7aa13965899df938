# SPDX-License-Identifier: Apache-2.0
"""Exported programs as files, each with what one has to know to use it, and read back."""

import importlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

from detr_fast.atomic_file import write_whole
from detr_fast.config import UsageError
from detr_fast.export.program import OUTPUTS

ENTRY = "detr_fast"  # of a file's metadata: JSON
OPSET = 18
FORMS = {
    "onnx": "ONNX, for onnxruntime, TensorRT, OpenVINO",
    "export": "torch.export's program, for torch.export.load",
    "aoti": "compiled by AOTInductor for this machine, for C++ without Python",
}
Run = Callable[..., tuple[Tensor, ...]]


class Exported(NamedTuple):
    """A traced model, and what travels beside it."""

    program: ExportedProgram
    raw: bool
    about: dict[str, Any]  # JSON: class names, image size, ...


def needed(form: str) -> None:
    """Raise UsageError if a library that a form needs is not installed."""
    for name in ("onnx", "onnxscript", "onnxruntime") if form == "onnx" else ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f'ONNX needs {name}: pip install "detr-fast[export]"') from error


def write(exported: Exported, path: Path, form: str, *, opset: int = OPSET) -> None:
    """Write a file, whole or not at all.

    Args:
        exported (Exported): the traced model.
        path (Path): the file.
        form (str): of `FORMS`.
        opset (int): version of ONNX's operators, at least 18.

    Raises:
        UsageError: if a library is missing.
    """
    needed(form)
    about = json.dumps(exported.about)
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "onnx":
        write_whole(path, _onnx(exported, about, opset))
    elif form == "export":
        buffer = io.BytesIO()
        torch.export.save(exported.program, buffer, extra_files={f"{ENTRY}.json": about})
        write_whole(path, buffer.getvalue())
    else:
        # the name of the file must end in .pt2
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.pt2")
        try:
            torch._inductor.aoti_compile_and_package(
                exported.program,
                package_path=str(temporary),
                inductor_configs={"aot_inductor.metadata": {ENTRY: about}},
            )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _onnx(exported: Exported, about: str, opset: int) -> bytes:
    names = [spec.arg.name for spec in exported.program.graph_signature.input_specs]
    inputs = [name for name in names if name in ("images", "sizes")]
    dims = {"images": {0: "batch", 2: "height", 3: "width"}, "sizes": {0: "batch"}}
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)  # tells of every operator that it leaves as it is
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own deprecated calls
            program = torch.onnx.export(
                exported.program,
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=OUTPUTS[exported.raw],
                dynamic_shapes={name: dims[name] for name in inputs},
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    proto = program.model_proto
    entry = proto.metadata_props.add()
    entry.key, entry.value = ENTRY, about
    content: bytes = proto.SerializeToString()
    return content


def load(path: Path, form: str) -> Run:
    """Read a file as those who deploy it do.

    Returns:
        Callable: from the inputs of `detr_fast.export.Deployed` to its outputs.
    """
    if form == "export":
        module = torch.export.load(path).module()
        return lambda *inputs: tuple(module(*inputs))
    if form == "aoti":
        package = torch._inductor.aoti_load_package(str(path))
        return lambda *inputs: tuple(package(*inputs))
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names: Sequence[str] = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = {n: x.cpu().numpy() for n, x in zip(names, inputs, strict=True)}
        return tuple(map(torch.from_numpy, session.run(None, values)))

    return run
