# SPDX-License-Identifier: Apache-2.0
"""Programs that a test needs and Python's packages do not bring."""

import os
import shutil

import pytest


def program(package, *names):
    """The path of the first of these programs; without one CI fails, and a developer's test skips.

    Args:
        package (str): what Debian calls it.
        *names (str): of the program.
    """
    for name in names:
        if path := shutil.which(name):
            return path
    message = f"no {' or '.join(names)} on the path: apt-get install {package}"
    return (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
