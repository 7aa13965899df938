# SPDX-License-Identifier: Apache-2.0
"""``tools/predict.py``: images in, boxes drawn and written."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from detr_fast.command_line import Parser
from detr_fast.config import UsageError
from detr_fast.data.annotations import read_json
from detr_fast.data.images import UnusableImage
from detr_fast.engine.host_memory import keep_freed_memory
from detr_fast.engine.log import progress, say
from detr_fast.predict.detector import Detector
from detr_fast.predict.sources import Source, find_sources
from detr_fast.predict.writers import CocoResults, CsvTable, Pictures

DESCRIPTION = """Find objects in images, draw them, and write them as COCO results and CSV."""
SAVED = ("pictures", "json", "csv")
NO_CHECKPOINT = (
    "--checkpoint: name one: outputs/shapes/checkpoint.pth of `uv run tools/train.py`, a file of "
    "facebookresearch/detr, or detr_resnet50, whose published weights are fetched"
)


def parser(program: str) -> Parser:
    """The command line."""
    parser = Parser(prog=program, description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument_group("what").add_argument
    add("--checkpoint", default="", help="a file, an https address, or detr_resnet50 and its kin")
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="IMAGES",
        help="images, folders with all below them, patterns, videos; shapes: generated images",
    )
    add("--threshold", type=float, default=0.5, metavar="X", help="the least score (0.5)")
    add("--limit", type=int, default=0, metavar="N", help="look at the first N images; 0: all")
    add("--image_size", type=int, metavar="N", help="short side in pixels (that of the training)")
    add("--dilation", action="store_true", default=None, help="a DC5 file that does not say so")
    add = parser.add_argument_group("speed").add_argument
    add("--device", default="auto", metavar="TEXT", help="auto (CUDA if there is one), cpu, ...")
    add("--batch_size", type=int, default=1, metavar="N", help="images of a forward pass (1)")
    add("--num_workers", type=int, default=2, metavar="N", help="threads that read images (2)")
    choices = ("auto", "off", "bf16", "fp16")
    add("--amp", default="auto", choices=choices, help="precision; auto: float32 (auto)")
    add("--compile", default="off", choices=("on", "off"), help="torch.compile (off)")
    add("--cuda_graphs", default="off", choices=("on", "off"), help="least latency on CUDA (off)")
    add = parser.add_argument_group("results").add_argument
    add("--output_dir", default="outputs/predict", metavar="FOLDER", help="(outputs/predict)")
    add("--save", nargs="+", choices=SAVED, default=SAVED, help="what to write (all of it)")
    add("--format", choices=("jpg", "png"), default="jpg", help="of pictures (jpg)")
    add("--attention", action="store_true", help="also draw where each object's query looked")
    add("--image_ids", metavar="FILE", help="COCO JSON whose image ids, by file name, JSON gets")
    return parser


def run(options: argparse.Namespace) -> int:
    """Predict; exit code 0, or 2 if no image could be used."""
    if not options.checkpoint:
        raise UsageError(NO_CHECKPOINT)
    if options.limit < 0:
        raise UsageError(f"--limit {options.limit}: expected at least 0")
    sources = list(_sources(options))
    detector = Detector.from_checkpoint(
        options.checkpoint,
        device=options.device,
        amp=options.amp,
        image_size=options.image_size,
        compile=options.compile,
        cuda_graphs=options.cuda_graphs,
        dilation=options.dilation,
    )
    if detector.device.type == "cpu":
        keep_freed_memory()
    image_ids = _image_ids(options.image_ids) if options.image_ids else None
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(folder / "pictures", options.format)
    results = CocoResults(image_ids, detector.category_ids)
    table = CsvTable(folder / "detections.csv") if "csv" in options.save else None
    left_out: list[str] = []

    def leave_out(source: Source, why: UnusableImage) -> None:
        left_out.append(source.name)
        say(f"warning: {source.name} {why}; it is left out")

    images = objects = 0
    start = time.perf_counter()
    predictions = detector.stream(
        sources,
        options.threshold,
        batch_size=options.batch_size,
        workers=options.num_workers,
        attention=options.attention,
        unusable=leave_out,
    )
    try:
        for prediction in progress(predictions, len(sources), "predict"):
            images, objects = images + 1, objects + len(prediction.detections)
            if "pictures" in options.save:
                pictures.write(prediction)
            if table:
                table.write(prediction.detections)
            results.add(prediction)
    finally:
        if table:
            table.close()
        if "json" in options.save:
            results.write(folder / "detections.json")
    if not images:
        raise UsageError(f"none of the {len(sources)} images can be used: see the warnings above")
    seconds = time.perf_counter() - start
    say(
        f"{objects} objects in {images} images, {images / seconds:.1f} images/s with reading and "
        f"writing" + (f"; {len(left_out)} left out" if left_out else "")
    )
    say(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


def _sources(options: argparse.Namespace) -> Iterator[Source]:
    for number, source in enumerate(find_sources(options.input)):
        if options.limit and number == options.limit:
            return
        yield source


def _image_ids(file: str) -> dict[str, int]:
    content = read_json(Path(file))
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UsageError(f"--image_ids {file}: expected COCO's form, with a list 'images'")
    try:
        return {Path(str(entry["file_name"])).name: int(entry["id"]) for entry in entries}
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"--image_ids {file}: an image without file_name or id ({error!r})"
        ) from error
