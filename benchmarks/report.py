# SPDX-License-Identifier: Apache-2.0
"""Records as tables to read."""

import textwrap
from typing import Any

WIDE = {"img_s": "img/s", "peak_mib": "MiB at peak"}


def results_page(page: dict[str, Any]) -> str:
    """The results of one device as Markdown: what it is, the state of each part, its records."""
    facts = ("torch", "cuda", "driver", "python")
    known = [f"{name} {page[name]}" for name in facts if page.get(name)]
    quick = ["", "A quick run: these figures mean nothing."] if page["quick"] else []
    lines = [f"# {page['name']}", "", ", ".join(known), *quick, ""]
    lines += ["| part | status | seconds | commit | date | note |"]
    lines += ["| --- | --- | ---: | --- | --- | --- |"]
    for name, part in page["parts"].items():
        cells = [name, part["status"], f"{part['seconds']:g}", part["commit"][:10], part["date"]]
        lines.append(f"| {' | '.join([*cells, _cell(part.get('note', ''))])} |")
    for name, part in page["parts"].items():
        if records := part.get("records"):
            lines += ["", f"## {name}", "", records_table(records).rstrip()]
    return "\n".join(lines) + "\n"


def records_table(records: list[dict[str, Any]]) -> str:
    """Records as Markdown: cases of a benchmark, their errors below, then records of other form."""
    cases = [record for record in records if "subject" in record]
    errors = [f"- **{r['case']}** failed: {_cell(r['error'])}" for r in records if "error" in r]
    others = [record for record in records if not {"subject", "error"} & record.keys()]
    tables = (_cases_table(cases), "\n".join(errors), _plain_table(others))
    return "\n\n".join(table for table in tables if table) + "\n"


def _cases_table(cases: list[dict[str, Any]]) -> str:
    if not cases:
        return ""
    # columns of whole models; other tables do without
    wide = {key: name for key, name in WIDE.items() if any(key in record for record in cases)}
    names = ["case", "subject", "us", "spread", *wide.values(), "GPU us", "of the limit", "peers"]
    numbers = {"us", "spread", "GPU us", *wide.values()}
    lines = [f"| {' | '.join(names)} |"]
    lines.append(f"| {' | '.join('---:' if name in numbers else '---' for name in names)} |")
    for record in cases:
        cells = [record["case"], record["subject"] + _ops(record)]
        cells += [f"{record['us']:g}", f"{record['spread']:.0%}" if "spread" in record else ""]
        cells += [f"{record[key]:g}" if key in record else "" for key in (*wide, "gpu_us")]
        cells.append(_rate(record))
        cells.append("; ".join(_peer(*item) for item in record["peers"].items()))
        lines.append(f"| {' | '.join(_cell(c) for c in cells)} |")
    return "\n".join(lines)


def _peer(name: str, entry: dict[str, Any]) -> str:
    if "missing" in entry:
        return f"{name}: missing ({textwrap.shorten(entry['missing'], 60)})"
    gpu = f", {entry['gpu_ratio']:g}x GPU time" if "gpu_ratio" in entry else ""
    wide = "".join(f", {entry[key]:g} {unit}" for key, unit in WIDE.items() if key in entry)
    return f"{name} {entry['ratio']:g}x ({entry['us']:g} us{wide}{gpu}{_ops(entry)})"


def _ops(entry: dict[str, Any]) -> str:
    return f", {entry['ops']} ops" if "ops" in entry else ""


def _rate(record: dict[str, Any]) -> str:
    parts = []
    if "gb_s" in record:
        parts.append(f"{record['gb_s']:g} GB/s, {record['copy_share']:.1%} of a copy")
    if "tflop_s" in record:
        parts.append(f"{record['tflop_s']:g} TFLOP/s, {record['matmul_share']:.1%} of a matmul")
    if "scores_s" in record:
        share = f", {record['bound_share']:.1%} of the bound" if "bound_share" in record else ""
        parts.append(f"{record['scores_s'] / 1e9:.4g} G scores/s{share}")
    return "; ".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _plain_table(records: list[dict[str, Any]]) -> str:
    """One column for each key."""
    if not records:
        return ""
    keys = list(dict.fromkeys(key for record in records for key in record if key != "output"))
    lines = [f"| {' | '.join(keys)} |", f"| {' | '.join('---' for _ in keys)} |"]
    for record in records:
        lines.append(f"| {' | '.join(_cell(str(record.get(key, ''))) for key in keys)} |")
    return "\n".join(lines)
