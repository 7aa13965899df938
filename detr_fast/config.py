# SPDX-License-Identifier: Apache-2.0
"""The flags of training and evaluation: one dataclass, from which the command line is derived.

Names and defaults are those of facebookresearch/detr's ``main.py``. A value comes from the first
that names it: the command line, the checkpoint of ``--resume`` (of ``--finetune``: architecture
only), ``--model``, the preset of ``--dataset_file``, the default.
"""

import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from detr_fast.data.augmentation import longest_side
from detr_fast.models.detr import MODELS
from detr_fast.models.model_config import BACKBONES, POSITION_EMBEDDINGS, ModelConfig
from detr_fast.models.position_encoding import PositionEncodingLearned

LOGGERS = ("tensorboard", "wandb", "mlflow")
PANOPTIC = "panoptic heads are not in this version of detr_fast"


class UsageError(Exception):
    """A mistake of the user: the command line ends with its message and exit code 2."""


def flag(default: Any, help: str, group: str, **options: Any) -> Any:
    """Declare a field of `Config` and its flag; ``options`` go to ``add_argument``."""
    return field(default=default, metadata={"help": help, "group": group, "options": options})


@dataclass(frozen=True)
class Config:
    """Everything that a run is told; each field is the flag of the same name."""

    # fmt: off
    # ruff: noqa: E501
    dataset_file: str = flag("", "coco, or shapes (generated images); default: coco with --coco_path, else shapes", "data")
    coco_path: str = flag("", "folder of the data: COCO (train2017/, val2017/, annotations/), Roboflow, YOLO (or its data.yaml) or Pascal VOC; recognised and said", "data", aliases=("data_path",))
    train_images: str = flag("", "own data: folder of the training images", "data")
    train_annotations: str = flag("", "own data: COCO-format JSON of the training images, any category ids", "data")
    val_images: str = flag("", "own data: folder of the validation images", "data")
    val_annotations: str = flag("", "own data: COCO-format JSON of the validation images", "data")
    image_size: int = flag(800, "short side of an image at evaluation, in pixels; training draws it from 0.6 to 1 times that", "data")
    check_data: bool = flag(False, "read all annotations and images, say what is wrong with them, and stop", "data")
    strict_data: bool = flag(False, "stop at wrong annotations and images; default: they are left out and counted", "data")
    coco_panoptic_path: str = flag("", "not used: " + PANOPTIC, "data")
    remove_difficult: bool = flag(False, "leave out objects that Pascal VOC marks as difficult", "data")
    num_workers: int = flag(2, "processes that load images", "data")
    batch_size: int = flag(2, "images per forward pass", "data")

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
    freeze: str = flag("", "parts that do not learn: beginnings of parameter names with commas between, e.g. backbone,transformer.encoder", "model")
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
    lr_drop: float = flag(200, "epochs after which the learning rates are divided by 10; below 1: share of --epochs", "optimisation")
    clip_max_norm: float = flag(0.1, "largest norm of the gradient; 0 leaves it alone", "optimisation")
    accumulate_steps: int = flag(1, "forward passes whose gradients are averaged for one update", "optimisation")
    max_skipped_steps: int = flag(10, "updates in a row without a finite loss and gradient after which training stops; fewer are left out and said", "optimisation")
    warmup_steps: int = flag(0, "updates over which the learning rates rise from 0", "optimisation")
    ema_decay: float = flag(0, "evaluate a moving average of the weights with this decay, e.g. 0.9997; 0: off", "optimisation")
    patience: int = flag(0, "stop after this many epochs without a better AP; 0: off", "optimisation")

    backend: str = flag("fast", "fast, or reference: the original's step in plain PyTorch, for comparison; it takes none of the flags below", "speed", choices=("fast", "reference"))
    amp: str = flag("auto", "precision of products: off (float32), bf16 or fp16; auto: bf16 on CUDA, in training also on CPUs that compute in it", "speed", choices=("auto", "off", "bf16", "fp16"))
    padding: str = flag("bucket", "training batches: bucket (images of like sizes together, sizes rounded up to --bucket) or official (any images together, padded to the largest); evaluation is official", "speed", choices=("bucket", "official"))
    bucket: int = flag(64, "pixels to whose multiples the sizes of training batches are rounded up", "speed")
    compile: str = flag("off", "torch.compile of the model: on or off; auto: on CUDA, to train", "speed", choices=("auto", "on", "off"))
    cuda_graphs: str = flag("off", "replay steps of shapes that return as CUDA graphs: on or off; auto: on CUDA", "speed", choices=("auto", "on", "off"))
    cache: str = flag("auto", "decoded images in memory, where all loader processes share them from the first epoch on: ram or off; auto: where they fit into half of what is free", "speed", choices=("auto", "off", "ram"))

    output_dir: str = flag("", "folder for log, checkpoints and pictures; empty writes none", "run")
    device: str = flag("auto", "auto (CUDA if there is one), cuda, cuda:1, cpu, ...", "run")
    seed: int = flag(42, "seed of all random numbers", "run")
    deterministic: bool = flag(False, "deterministic algorithms on CUDA too, where they are slower", "run")
    resume: str = flag("", "checkpoint to continue from: a file, an https address, or auto: the newest good one in --output_dir", "run")
    finetune: str = flag("", "checkpoint whose weights to start from, for other classes or queries: a file or an https address", "run")
    checkpoint_steps: int = flag(1000, "forward passes between two checkpoints within an epoch; 0: only after epochs", "run")
    keep_checkpoints: int = flag(2, "how many of the last checkpoints are kept", "run")
    dry_run: bool = flag(False, "try data and memory with two steps on the largest batches and one validation batch, write nothing, and stop", "run")
    loggers: str = flag("", "send curves and pictures elsewhere, too: tensorboard, wandb, mlflow, with commas between", "run")
    debug: bool = flag(False, "show the traceback of an error", "run")
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

    @property
    def lr_drop_epoch(self) -> int:
        """Epochs after which the learning rates are divided by 10, at least 1."""
        return (
            round(self.lr_drop) if self.lr_drop >= 1 else max(1, round(self.lr_drop * self.epochs))
        )

    @property
    def logger_names(self) -> list[str]:
        """The names in ``--loggers``, each once."""
        return list(dict.fromkeys(n.strip() for n in self.loggers.split(",") if n.strip()))

    def data(self) -> str:
        """The data in few words."""
        if self.dataset_file == "shapes":
            return "generated images"
        return self.coco_path or (self.val_annotations if self.eval else self.train_annotations)

    def headline(self) -> str:
        """What will run, in one line."""
        images = self.data()
        if self.check_data:
            return f"preset {self.dataset_file}: checking {images}"
        if self.eval:
            return f"preset {self.dataset_file}: evaluating {self.resume} on {images}"
        return (
            f"preset {self.dataset_file}: training {self.model or self.backbone} on {images}, "
            f"{self.epochs} epochs, batch size {self.batch_size}"
            + (f", from the weights of {self.finetune}" if self.finetune else "")
            + (", a dry run" if self.dry_run else "")
            + (f", into {self.output_dir}" if self.output_dir and not self.dry_run else "")
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


class Stored(NamedTuple):
    """What a checkpoint says of the run that wrote it.

    Attributes:
        architecture (dict): flags that its weights determine.
        run (dict): the other flags of that run; empty where it tells none.
    """

    architecture: dict[str, Any]
    run: dict[str, Any]


DATA_FLAGS = ("coco_path", "train_images", "train_annotations", "val_images", "val_annotations")
# what --backend reference stands for; it also takes `auto`, which means the same
REFERENCE_FLAGS = {
    "amp": "off",
    "padding": "official",
    "compile": "off",
    "cuda_graphs": "off",
    "cache": "off",
}
_SPEED = [entry.name for entry in fields(Config) if entry.metadata["group"] == "speed"]
# what belongs to a call, not to a run that goes on
_OF_A_CALL = (
    "resume",
    "finetune",
    "start_epoch",
    "eval",
    "check_data",
    "dry_run",
    "debug",
    "device",
)
# what an evaluation takes from the run; the rest is as the command line says
_OF_THE_DATA = ("dataset_file", "image_size", "remove_difficult", *DATA_FLAGS)


def configure(given: dict[str, Any], stored: Stored | None = None) -> Config:
    """Complete the flags of a command line.

    Args:
        given (dict): what stands on the command line.
        stored (Stored, optional): what the checkpoint of ``--resume`` or ``--finetune`` says.

    Raises:
        UsageError: if a value is out of range, contradicts the checkpoint, or asks for what is not
            in this version.
    """
    given = dict(given)
    if given.get("resume") and given.get("finetune"):
        raise UsageError("--resume goes on with a run, --finetune starts one: give one of the two")
    own_data = any(given.get(name) for name in DATA_FLAGS)
    dataset = given.get("dataset_file") or ("coco" if own_data else "")
    earlier = stored.run.get("dataset_file") if stored else None
    if given.get("resume") and not given.get("eval") and earlier and dataset not in ("", earlier):
        given["finetune"] = given.pop("resume")  # on other data there is no run to go on with
    source = given.get("resume") or given.get("finetune")
    architecture = dict(stored.architecture) if stored else {}
    named = {**_architecture(given.get("model", "")), **given}
    for name in sorted(architecture.keys() & named.keys()):
        if named[name] == architecture[name]:
            continue
        if name == "num_queries" and given.get("finetune"):
            del architecture[name]  # the queries start anew
            continue
        raise UsageError(
            f"--{name}: {named[name]!r} contradicts the checkpoint {source}, which has "
            f"{architecture[name]!r}: leave the flag out or take another checkpoint"
            + (" (or start from its weights with --finetune)" * (name == "num_queries"))
        )
    run = _returning(stored.run, given, own_data) if stored else {}
    dataset = dataset or run.get("dataset_file", "shapes")
    if "panoptic" in dataset or given.get("masks") or given.get("frozen_weights"):
        raise UsageError(f"--masks, --frozen_weights, --dataset_file coco_panoptic: {PANOPTIC}")
    if dataset not in PRESETS:
        raise UsageError(f"--dataset_file: expected one of {', '.join(PRESETS)}, got {dataset!r}")
    preset = PRESETS[dataset]
    of_model = _architecture(given.get("model", preset.get("model", "")))
    values = {**preset, **of_model, **run, **architecture, **given, "dataset_file": dataset}
    if values.get("eval"):  # only a folder that was asked for is written to
        values["output_dir"] = given.get("output_dir", "")
    if values.get("backend") == "reference":
        for name in sorted(given.keys() & set(_SPEED) - {"backend"}):
            if given[name] not in ("auto", REFERENCE_FLAGS.get(name)):
                raise UsageError(
                    f"--{name} {given[name]} contradicts --backend reference, the original's step: "
                    "leave one of the two out"
                )
        values |= REFERENCE_FLAGS
    config = Config(**values)
    _check(config)
    return config


def _returning(run: dict[str, Any], given: dict[str, Any], own_data: bool) -> dict[str, Any]:
    """The flags of an earlier run that hold for this call, too."""
    if given.get("finetune"):
        return {}
    known = {entry.name for entry in fields(Config) if _takes(entry, run.get(entry.name))}
    known -= set(_OF_A_CALL)
    if given.get("eval"):
        known &= set(_OF_THE_DATA)
    if run.get("backend") == "reference":  # its flags follow from it, and go with it
        known -= set(_SPEED) - {"backend"}
    if own_data:  # all of it is named anew
        known -= set(DATA_FLAGS)
    folder = Path(given.get("resume", "")).parent
    if "output_dir" in known and Path(run["output_dir"]).resolve() != folder.resolve():
        known.remove("output_dir")  # a file that has moved does not say where to write
    return {name: value for name, value in run.items() if name in known}


def _takes(entry: Any, value: Any) -> bool:
    """Whether a stored value is one that the flag could have."""
    kind = (int, float) if entry.type is float else entry.type
    choices = entry.metadata["options"].get("choices")
    return isinstance(value, kind) and (not choices or value in choices or value == entry.default)


def output_dir(given: dict[str, Any]) -> str:
    """The folder that a command line writes to; empty for none."""
    dataset = given.get("dataset_file") or "shapes"
    preset = {} if any(given.get(name) for name in DATA_FLAGS) else PRESETS.get(dataset, {})
    return str(given.get("output_dir", preset.get("output_dir", "")))


def _architecture(model: str) -> dict[str, Any]:
    """The flags that ``--model`` stands for."""
    flags = asdict(MODELS[model]) if model else {}
    flags.pop("num_classes", None)
    return flags


def _check(config: Config) -> None:
    """Refuse values that would fail later, far from their cause."""
    least = {"batch_size": 1, "epochs": 0, "lr_drop": 0, "num_workers": 0, "print_freq": 1}
    least |= {"start_epoch": 0, "lr": 0, "lr_backbone": 0, "weight_decay": 0, "clip_max_norm": 0}
    least |= {"accumulate_steps": 1, "warmup_steps": 0, "ema_decay": 0, "patience": 0, "seed": 0}
    least |= {"checkpoint_steps": 0, "keep_checkpoints": 1, "image_size": 32}
    least |= {"max_skipped_steps": 1, "bucket": 1}
    for entry in fields(Config):
        if entry.type is float and not math.isfinite(getattr(config, entry.name)):
            value = getattr(config, entry.name)
            raise UsageError(f"--{entry.name}: expected a finite number, got {value}")
    least |= {"eos_coef": 0, "bbox_loss_coef": 0, "giou_loss_coef": 0}
    for name, bound in least.items():
        if not getattr(config, name) >= bound:
            raise UsageError(f"--{name}: expected at least {bound}, got {getattr(config, name)}")
    if config.ema_decay >= 1:
        raise UsageError(f"--ema_decay: expected less than 1, got {config.ema_decay}")
    if wrong := set(config.logger_names) - set(LOGGERS):
        raise UsageError(
            f"--loggers: expected of {', '.join(LOGGERS)}, got {', '.join(sorted(wrong))}"
        )
    if config.seed >= 2**32:
        raise UsageError(f"--seed: expected less than 2**32, got {config.seed}")
    if not config.lr_drop:
        raise UsageError(f"--lr_drop: expected epochs or a share of them, got {config.lr_drop}")
    try:
        config.model_config(num_classes=1)
    except ValueError as error:  # names the field, and with it the flag
        raise UsageError(f"--{error}") from error
    if not (config.set_cost_class or config.set_cost_bbox or config.set_cost_giou):
        raise UsageError("--set_cost_class, --set_cost_bbox and --set_cost_giou: all of them are 0")
    _check_grid(config)
    if config.world_size != 1 or os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UsageError(
            "--world_size, or WORLD_SIZE of a launcher: this version of detr_fast runs one process"
        )
    _check_data(config)
    if config.eval and not config.resume:
        raise UsageError("evaluation needs --resume, the checkpoint to evaluate")
    if config.save_json and not config.output_dir:
        raise UsageError("--save_json needs --output_dir, the folder to write to")


def _check_grid(config: Config) -> None:
    """Refuse images larger than learned positions reach."""
    if config.position_embedding != "learned" or config.dataset_file != "coco":
        return
    stride = 16 if config.dilation or config.backbone == "tiny" else 32
    longest, cells = longest_side(config.image_size), PositionEncodingLearned.size
    if longest > stride * cells:
        raise UsageError(
            f"--position_embedding learned: knows {cells} cells of {stride} pixels a side, "
            f"images are up to {longest} pixels long: lower --image_size, or take sine"
        )


def _check_data(config: Config) -> None:
    """Refuse data that are named in part, twice, or not at all."""
    if config.dataset_file != "coco":
        return
    splits = ("val",) if config.eval else ("train", "val")
    named = [name for name in DATA_FLAGS[1:] if getattr(config, name)]
    if config.coco_path and named:
        raise UsageError(f"--coco_path and --{named[0]} both name the data: give one of the two")
    needed = [f"{split}_{part}" for split in splits for part in ("images", "annotations")]
    missing = [name for name in needed if not getattr(config, name)]
    if named and missing:
        raise UsageError(f"--{named[0]} needs --{', --'.join(missing)}, too")
    if not config.coco_path and missing:
        raise UsageError(
            "--dataset_file coco needs --coco_path, the folder of the data, "
            f"or --{', --'.join(needed)}"
        )
