# SPDX-License-Identifier: Apache-2.0
"""Records as tables to read."""

import textwrap
from typing import Any


def records_table(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the records of a benchmark, and its errors below."""
    lines = ["| case | subject | us | spread | GPU us | of the limit | peers |"]
    lines.append("| --- | --- | ---: | ---: | ---: | --- | --- |")
    for record in (r for r in records if "error" not in r):
        cells = [record["case"], record["subject"]]
        if "us" in record:
            spread, gpu = f"{record['spread']:.0%}", record.get("gpu_us", "")
            cells += [str(record["us"]), spread, str(gpu), _rate(record)]
        else:
            cells += ["", "", "", f"equal: {', '.join(record['equal'])}"]
        cells.append("; ".join(_peer(*item) for item in record["peers"].items()))
        lines.append(f"| {' | '.join(_cell(c) for c in cells)} |")
    errors = [f"- **{r['case']}** failed: {_cell(r['error'])}" for r in records if "error" in r]
    return "\n".join([*lines, "", *errors]).rstrip() + "\n"


def _peer(name: str, entry: dict[str, Any]) -> str:
    if "missing" in entry:
        return f"{name}: missing ({textwrap.shorten(entry['missing'], 60)})"
    gpu = f", {entry['gpu_ratio']:g}x GPU time" if "gpu_ratio" in entry else ""
    return f"{name} {entry['ratio']:g}x ({entry['us']:g} us{gpu})"


def _rate(record: dict[str, Any]) -> str:
    parts = []
    if "gb_s" in record:
        parts.append(f"{record['gb_s']:g} GB/s, {record['copy_share']:.1%} of a copy")
    if "tflop_s" in record:
        parts.append(f"{record['tflop_s']:g} TFLOP/s, {record['matmul_share']:.1%} of a matmul")
    return "; ".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
