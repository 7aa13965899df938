# SPDX-License-Identifier: Apache-2.0
"""``tools/convert_checkpoint.py``: weights from one form into another, exactly."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from detr_fast.atomic_file import write_whole
from detr_fast.command_line import Parser
from detr_fast.config import UsageError
from detr_fast.engine.build import class_names_of, evaluated_weights
from detr_fast.engine.log import say
from detr_fast.models.checkpoint import (
    CheckpointError,
    model_config_from_checkpoint,
    read_checkpoint,
    weights_of,
    write_checkpoint,
)
from detr_fast.models.model_config import ModelConfig
from detr_fast.models.safetensors_file import write_safetensors
from detr_fast.models.transformers_keys import from_transformers, to_transformers
from detr_fast.reference.image import IMAGENET_MEAN, IMAGENET_STD

DESCRIPTION = """Convert the weights of a DETR between facebookresearch/detr, transformers and
safetensors. Every number stays what it is; class names travel along."""
FORMS = {
    "detr": "a .pth that this package and facebookresearch/detr read",
    "safetensors": "one file with the same names of weights",
    "transformers": "a folder for DetrForObjectDetection.from_pretrained",
}
WEIGHTS, CONFIG = "model.safetensors", "config.json"
DEPTHS = {"resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}
# fields of ModelConfig and what transformers calls them
FIELDS = {
    "hidden_dim": ("d_model",),
    "enc_layers": ("encoder_layers", "num_hidden_layers"),
    "dec_layers": ("decoder_layers",),
    "dim_feedforward": ("encoder_ffn_dim", "decoder_ffn_dim"),
    "nheads": ("encoder_attention_heads", "decoder_attention_heads"),
    "dropout": ("dropout",),
    "num_queries": ("num_queries",),
    "position_embedding": ("position_embedding_type",),
    "dilation": ("dilation",),
}


class Weights(NamedTuple):
    """Weights under the names of facebookresearch/detr, and what is said beside them."""

    form: str
    state: dict[str, Tensor]
    config: ModelConfig
    class_names: dict[int, str] | None
    category_ids: dict[int, int] | None
    left: list[str]  # entries that do not travel


def parser(program: str) -> Parser:
    """The command line."""
    parser = Parser(prog=program, description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("source", metavar="IN", help="a .pth, a .safetensors, or a folder of transformers")
    add("target", metavar="OUT", help="the file, or the folder, to write")
    forms = "; ".join(f"{name}: {text}" for name, text in FORMS.items())
    add("--to", choices=FORMS, default="", help=f"{forms} (as OUT ends)")
    add("--dilation", action="store_true", default=None, help="a DC5 file that does not say so")
    add("--dry_run", action="store_true", help="say what would be written, and write nothing")
    add("--overwrite", action="store_true", help="replace what is there")
    return parser


def run(options: argparse.Namespace) -> int:
    """Convert; exit code 0."""
    target = Path(options.target)
    form = options.to or _form_of(target)
    weights = read(options.source)
    if options.dilation:
        weights = weights._replace(config=replace(weights.config, dilation=True))
    files = contents(weights, form)
    _report(options.source, weights, target, form, files)
    if options.dry_run:
        say("a dry run: nothing was written")
        return 0
    if target.exists() and not options.overwrite:
        raise UsageError(f"{target} is there already: name another one, or give --overwrite")
    write(weights, target, form)
    say(f"{target} is written")
    return 0


def _form_of(target: Path) -> str:
    if target.suffix == ".safetensors":
        return "safetensors"
    return "detr" if target.suffix in (".pth", ".pt") else "transformers"


def read(source: str) -> Weights:
    """Read weights in any of the forms, which is found out.

    Args:
        source (str): a file, a folder of transformers, or an https address.

    Raises:
        CheckpointError: if there is no such file, or it holds no DETR.
    """
    folder = Path(source)
    if folder.is_dir():
        return _read_folder(folder)
    content = read_checkpoint(source)
    left = sorted(set(content) - {"model", "model_config", "class_names", "category_ids", "sha256"})
    if "model" not in content and "state_dict" not in content:
        left = []
    state = weights_of(evaluated_weights(content))
    if any(key.startswith("model.") for key in state):
        converted = {"model": from_transformers(state)}
        return _weights("transformers", converted, None, None, left)
    form = "safetensors" if folder.suffix == ".safetensors" else "detr"
    described = {k: v for k, v in content.items() if k in ("model_config", "args")}
    names = class_names_of(content)
    ids = content.get("category_ids")
    return _weights(form, {"model": state} | described, names, ids, left)


def _weights(
    form: str,
    content: dict[str, Any],
    names: dict[int, str] | None,
    ids: dict[int, int] | None,
    left: list[str],
) -> Weights:
    config = model_config_from_checkpoint(content)
    if config is None:
        raise CheckpointError("these are no weights of a DETR with a ResNet")
    return Weights(form, content["model"], config, names, ids, left)


def _read_folder(folder: Path) -> Weights:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: no {name}: expected a folder that save_pretrained wrote, in one file"
            )
    try:
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        names = {int(label): str(name) for label, name in (told.get("id2label") or {}).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG}: not of a DETR ({error})") from error
    if told.get("model_type") != "detr":
        raise CheckpointError(
            f"{folder / CONFIG}: model_type is {told.get('model_type')!r}, not 'detr'"
        )
    state = from_transformers(read_checkpoint(folder / WEIGHTS))
    args = {ours: told[theirs[0]] for ours, theirs in FIELDS.items() if theirs[0] in told}
    return _weights("transformers", {"model": state, "args": args}, names or None, None, [])


def contents(weights: Weights, form: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file of a form, by name.

    Raises:
        CheckpointError: if the form has no such model.
    """
    if form != "transformers":
        return {"": weights.state}
    config = weights.config
    if config.dilation:
        raise CheckpointError(
            "--to transformers: its own ResNet has no dilation (DC5); convert to safetensors"
        )
    return {WEIGHTS: to_transformers(weights.state, "published", "resnet")}


def write(weights: Weights, target: Path, form: str) -> None:
    """Write weights in a form.

    Args:
        weights (Weights): what `read` returned.
        target (Path): a file, or for transformers a folder; what is in the way is replaced.
        form (str): of `FORMS`.
    """
    beside = {
        "model_config": asdict(weights.config),
        "class_names": weights.class_names,
        "category_ids": weights.category_ids,
    }
    beside = {name: value for name, value in beside.items() if value is not None}
    files = contents(weights, form)
    folder = target if form == "transformers" else target.parent
    folder.mkdir(parents=True, exist_ok=True)
    if form == "detr":
        write_checkpoint({"model": weights.state} | beside, target)
    elif form == "safetensors":
        write_safetensors(weights.state, beside, target)
    else:
        write_safetensors(files[WEIGHTS], {}, target / WEIGHTS, format="pt")
        for name, content in (
            ("preprocessor_config.json", PREPROCESSOR),
            (CONFIG, transformers_config(weights)),  # last: with it the folder is whole
        ):
            write_whole(target / name, (json.dumps(content, indent=2) + "\n").encode())


def transformers_config(weights: Weights) -> dict[str, Any]:
    """The ``config.json`` of DetrForObjectDetection with transformers' own ResNet."""
    config = weights.config
    names = weights.class_names or {}
    labels = {i: names.get(i, f"LABEL_{i}") for i in range(config.num_classes)}
    # of two labels of one name (the gaps of COCO are "N/A") the later one has it
    numbers = {name: label for label, name in labels.items()}
    backbone = {
        "model_type": "resnet",
        "depths": DEPTHS[config.backbone],
        "out_features": ["stage4"],
    }
    return {
        "architectures": ["DetrForObjectDetection"],
        "model_type": "detr",
        "backbone_config": backbone,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "auxiliary_loss": config.aux_loss,
        "id2label": {str(label): name for label, name in labels.items()},
        "label2id": numbers,
    } | {name: getattr(config, ours) for ours, theirs in FIELDS.items() for name in theirs}


PREPROCESSOR: Mapping[str, Any] = {
    "image_processor_type": "DetrImageProcessor",
    "format": "coco_detection",
    "do_resize": True,
    "size": {"shortest_edge": 800, "longest_edge": 1333},
    "do_normalize": True,
    "image_mean": list(IMAGENET_MEAN),
    "image_std": list(IMAGENET_STD),
}


def _report(
    source: str,
    weights: Weights,
    target: Path,
    form: str,
    files: Mapping[str, Mapping[str, Tensor]],
) -> None:
    config, numbers = weights.config, sum(value.numel() for value in weights.state.values())
    say(
        f"{source}: {weights.form}; DETR with {config.backbone}"
        f"{' (DC5)' if config.dilation else ''}, {config.num_classes} classes, "
        f"{config.num_queries} queries; {len(weights.state)} tensors, {numbers:,} numbers"
    )
    if weights.class_names:
        say(f"  class names: {', '.join(list(weights.class_names.values())[:6])}, ...")
    else:
        say("  no class names")
    if weights.left:
        say(f"  left behind: {', '.join(weights.left)}")
    for name, tensors in files.items():
        renamed = len(tensors.keys() - weights.state.keys())
        path = target / name if name else target
        say(f"{path}: {form}; {len(tensors)} tensors, {renamed} renamed")
