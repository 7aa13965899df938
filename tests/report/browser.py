# SPDX-License-Identifier: Apache-2.0
"""A page seen by a headless browser."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.programs import program

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "msedge")


class Seen(NamedTuple):
    """What the browser made of a page."""

    dom: str
    console: list[str]


def look(page: Path, screenshot: Path | None = None) -> Seen:
    """Open a page, wait until it is at rest, and note what it writes to the console."""
    profile = page.parent / "browser"
    arguments = [
        program("chromium", *NAMES),
        "--headless=new",
        "--no-sandbox",  # which root has to do without
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
        "--window-size=1280,4000",
        "--virtual-time-budget=5000",
        "--enable-logging=stderr",
        f"--screenshot={screenshot}" if screenshot else "--dump-dom",
        page.as_uri(),
    ]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    return Seen(run.stdout, re.findall(r"CONSOLE[^\]]*\] (.*)", run.stderr))
