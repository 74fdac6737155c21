"""A browser for the report's page."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> str:
    """Path of a Chromium; installed from Debian where it is missing and may be."""
    if path := _found():
        return path
    if shutil.which("apt-get") and os.geteuid() == 0:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-qq", "-y", "chromium"]):
            subprocess.run(command, check=True, capture_output=True, env=quiet)
        if path := _found():
            return path
    pytest.skip("no Chromium: install Debian's package chromium")


def _found() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)
