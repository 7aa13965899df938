# SPDX-License-Identifier: Apache-2.0
"""The flags of training and evaluation: one dataclass, from which the command line is derived.

Names and defaults are those of facebookresearch/detr's ``main.py``. A value comes from the first
that names it: the command line, the checkpoint of ``--resume``, ``--model``, the preset of
``--dataset_file``, the default.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NoReturn

from detr_fast.models.detr import MODELS
from detr_fast.models.model_config import BACKBONES, POSITION_EMBEDDINGS, ModelConfig

PANOPTIC = "panoptic heads are not in this version of detr_fast"


class UsageError(Exception):
    """A mistake of the user: the command line ends with its message and exit code 2."""


def flag(default: Any, help: str, group: str, **options: Any) -> Any:
    """Declare a field of :class:`Config` and its flag; ``options`` go to ``add_argument``."""
    return field(default=default, metadata={"help": help, "group": group, "options": options})


@dataclass(frozen=True)
class Config:
    """Everything that a run is told; each field is the flag of the same name."""

    # fmt: off
    # ruff: noqa: E501
    dataset_file: str = flag("", "coco, or shapes (generated images); default: coco with --coco_path, else shapes", "data")
    coco_path: str = flag("", "folder with train2017/, val2017/ and annotations/", "data")
    coco_panoptic_path: str = flag("", "not used: " + PANOPTIC, "data")
    remove_difficult: bool = flag(False, "accepted for compatibility; the original ignores it, too", "data")
    num_workers: int = flag(2, "processes that load images", "data")
    batch_size: int = flag(2, "images per step", "data")

    model: str = flag("", "sets the architecture flags", "model", choices=sorted(MODELS))
    backbone: str = flag("resnet50", "feature extractor", "model", choices=BACKBONES)
    backbone_weights: str = flag("imagenet", "imagenet, none, or a file; not used where --resume brings the model", "model")
    dilation: bool = flag(False, "dilation instead of stride in the last stage (DC5)", "model")
    position_embedding: str = flag("sine", "position encoding", "model", choices=POSITION_EMBEDDINGS)
    enc_layers: int = flag(6, "encoder layers", "model")
    dec_layers: int = flag(6, "decoder layers", "model")
    dim_feedforward: int = flag(2048, "width of the feed-forward blocks", "model")
    hidden_dim: int = flag(256, "width of the transformer", "model")
    dropout: float = flag(0.1, "dropout in the transformer", "model")
    nheads: int = flag(8, "attention heads", "model")
    num_queries: int = flag(100, "object queries", "model")
    pre_norm: bool = flag(False, "normalise before each block", "model")
    masks: bool = flag(False, PANOPTIC, "model")
    frozen_weights: str = flag("", PANOPTIC, "model")

    aux_loss: bool = flag(True, "no losses of the inner decoder layers", "loss", name="no_aux_loss")
    set_cost_class: float = flag(1, "class coefficient of the matching cost", "loss")
    set_cost_bbox: float = flag(5, "L1 coefficient of the matching cost", "loss")
    set_cost_giou: float = flag(2, "GIoU coefficient of the matching cost", "loss")
    mask_loss_coef: float = flag(1, "not used: " + PANOPTIC, "loss")
    dice_loss_coef: float = flag(1, "not used: " + PANOPTIC, "loss")
    bbox_loss_coef: float = flag(5, "weight of the L1 loss", "loss")
    giou_loss_coef: float = flag(2, "weight of the GIoU loss", "loss")
    eos_coef: float = flag(0.1, "relative weight of the class no-object", "loss")

    lr: float = flag(1e-4, "learning rate", "optimisation")
    lr_backbone: float = flag(1e-5, "learning rate of the backbone; 0 freezes it", "optimisation")
    weight_decay: float = flag(1e-4, "weight decay of AdamW", "optimisation")
    epochs: int = flag(300, "passes over the training images", "optimisation")
    lr_drop: int = flag(200, "epoch after which the learning rates are divided by 10", "optimisation")
    clip_max_norm: float = flag(0.1, "largest norm of the gradient; 0 leaves it alone", "optimisation")

    output_dir: str = flag("", "folder for log, checkpoints and pictures; empty writes none", "run")
    device: str = flag("auto", "auto (CUDA if there is one), cuda, cuda:1, cpu, ...", "run")
    seed: int = flag(42, "seed of all random numbers", "run")
    resume: str = flag("", "checkpoint to continue from: a file or an https address", "run")
    start_epoch: int = flag(0, "first epoch; --resume sets it", "run")
    print_freq: int = flag(10, "steps between two lines of the log", "run")
    world_size: int = flag(1, "accepted for compatibility; this version runs one process", "run")
    dist_url: str = flag("env://", "accepted for compatibility; this version runs one process", "run")

    eval: bool = flag(False, "evaluate the checkpoint of --resume; no training", "evaluation")
    evaluator: str = flag("hotcoco", "library that computes COCO AP", "evaluation", choices=("hotcoco", "pycocotools"))
    per_class: bool = flag(False, "also print the AP of each class", "evaluation")
    save_json: bool = flag(False, "also write all detections to OUTPUT_DIR/detections.json", "evaluation")
    # fmt: on

    def model_config(self, num_classes: int) -> ModelConfig:
        """The architecture that the flags ask for."""
        names = {f.name for f in fields(ModelConfig)} - {"num_classes"}
        return ModelConfig(num_classes, **{name: getattr(self, name) for name in names})

    def headline(self) -> str:
        """What will run, in one line."""
        images = "generated images" if self.dataset_file == "shapes" else self.coco_path
        if self.eval:
            return f"preset {self.dataset_file}: evaluating {self.resume} on {images}"
        return (
            f"preset {self.dataset_file}: training {self.model or self.backbone} on {images}, "
            f"{self.epochs} epochs, batch size {self.batch_size}"
            + (f", into {self.output_dir}" if self.output_dir else "")
        )


# What a data set sets where the command line is silent; `coco` is the original's recipe.
PRESETS: dict[str, dict[str, Any]] = {
    "coco": {},
    "shapes": {
        "model": "detr_tiny",
        "backbone_weights": "none",
        "batch_size": 32,
        "epochs": 20,
        "lr": 1e-3,
        "lr_backbone": 1e-3,
        "lr_drop": 16,
        "num_workers": 0,
        "output_dir": "outputs/shapes",
    },
}


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as :class:`UsageError`, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def _parser(program: str, description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        description=description,
        argument_default=argparse.SUPPRESS,  # what is left out is not in the namespace
        allow_abbrev=False,
    )
    entries = [entry for entry in fields(Config) if entry.metadata]
    names = dict.fromkeys(entry.metadata["group"] for entry in entries)
    groups = {name: parser.add_argument_group(name) for name in names}
    for entry in entries:
        options = dict(entry.metadata["options"])
        name, text = options.pop("name", entry.name), entry.metadata["help"]
        if entry.type is bool:
            options["action"] = "store_false" if entry.default else "store_true"
        else:
            options["type"] = entry.type
            text += f" ({entry.default})" if entry.default != "" else ""
        groups[entry.metadata["group"]].add_argument(
            f"--{name}", dest=entry.name, help=text, **options
        )
    return parser


def parse(program: str, description: str, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Read a command line: the flags that stand there, and no others.

    Args:
        program (str): its name in messages.
        description (str): the first lines of ``--help``.
        arguments (Sequence[str], optional): default: those of this process.

    Raises:
        UsageError: if a flag is unknown or has a value of the wrong kind.
    """
    return vars(_parser(program, description).parse_args(arguments))


def configure(given: dict[str, Any], stored: dict[str, Any] | None = None) -> Config:
    """Complete the flags of a command line.

    Args:
        given (dict): what stands on the command line.
        stored (dict, optional): what the checkpoint of ``--resume`` says of its model and data.

    Raises:
        UsageError: if a value is out of range, contradicts the checkpoint, or asks for what is not
            in this version.
    """
    stored = stored or {}
    # a data set has moved more often than it has changed: the path is not compared
    dataset = given.get("dataset_file") or ("coco" if given.get("coco_path") else "")
    named = {**_architecture(given.get("model", "")), **given, "dataset_file": dataset}
    for name in stored.keys() & named.keys() - {"coco_path"}:
        if named[name] not in ("", stored[name]):
            raise UsageError(
                f"--{name}: {named[name]!r} contradicts the checkpoint {given['resume']}, which has "
                f"{stored[name]!r}: leave the flag out or take another checkpoint"
            )
    dataset = dataset or stored.get("dataset_file", "shapes")
    if "panoptic" in dataset or given.get("masks") or given.get("frozen_weights"):
        raise UsageError(f"--masks, --frozen_weights, --dataset_file coco_panoptic: {PANOPTIC}")
    if dataset not in PRESETS:
        raise UsageError(f"--dataset_file: expected one of {', '.join(PRESETS)}, got {dataset!r}")
    preset = PRESETS[dataset]
    architecture = _architecture(given.get("model", preset.get("model", "")))
    values = {**preset, **architecture, **stored, **given, "dataset_file": dataset}
    if values.get("eval"):  # only a folder that was asked for is written to
        values["output_dir"] = given.get("output_dir", "")
    config = Config(**values)
    _check(config)
    return config


def _architecture(model: str) -> dict[str, Any]:
    """The flags that ``--model`` stands for."""
    flags = asdict(MODELS[model]) if model else {}
    flags.pop("num_classes", None)
    return flags


def _check(config: Config) -> None:
    """Refuse values that would fail later, far from their cause."""
    least = {"batch_size": 1, "epochs": 0, "lr_drop": 1, "num_workers": 0, "print_freq": 1}
    least |= {"start_epoch": 0, "lr": 0, "lr_backbone": 0, "weight_decay": 0, "clip_max_norm": 0}
    for name, bound in least.items():
        if not getattr(config, name) >= bound:
            raise UsageError(f"--{name}: expected at least {bound}, got {getattr(config, name)}")
    try:
        config.model_config(num_classes=1)
    except ValueError as error:  # names the field, and with it the flag
        raise UsageError(f"--{error}") from error
    if config.world_size != 1:
        raise UsageError("--world_size: this version of detr_fast runs one process")
    if config.dataset_file == "coco" and not config.coco_path:
        raise UsageError("--dataset_file coco needs --coco_path, the folder of the images")
    if config.eval and not config.resume:
        raise UsageError("evaluation needs --resume, the checkpoint to evaluate")
    if config.save_json and not config.output_dir:
        raise UsageError("--save_json needs --output_dir, the folder to write to")
