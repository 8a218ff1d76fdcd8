"""A browser of Chromium's kind on this machine. As a program: its path, or exit status 1 where there is none."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLES = ("CHROME", "CHROME_PATH", "CHROME_BIN", "BROWSER")
NAMES = (
    "chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "google-chrome-stable", "chrome",
    "chrome-headless-shell", "microsoft-edge", "microsoft-edge-stable", "brave-browser",
)  # fmt: skip
_KIND = ("chrom", "edge", "brave")
_DOWNLOADED = (
    "chromium*/chrome-linux*/chrome", "chromium*/chrome-mac*/*.app/*/MacOS/*",
    "chromium*/chrom*-linux*/*headless?shell", "chromium*/chrom*-mac*/*headless?shell",
)  # fmt: skip
"""Where playwright puts what it downloads, by revision."""
_APPLICATIONS = ("Chromium.app/Contents/MacOS/Chromium", "Google Chrome.app/Contents/MacOS/Google Chrome")


def chromium(variables: Mapping[str, str] = os.environ, home: Path | None = None) -> str | None:
    """What a variable names, then what playwright downloaded, its newest first, then the system's; None without one.

    BROWSER may list several, and name one of another kind, which is passed over.
    """
    home = Path.home() if home is None else home
    named = [part for variable in VARIABLES for part in variables.get(variable, "").split(os.pathsep)]
    for name in named:
        found = shutil.which(name.strip(), path=variables.get("PATH"))
        if found and any(kind in Path(found).resolve().name.lower() for kind in _KIND):
            return found
    given = variables.get("PLAYWRIGHT_BROWSERS_PATH", "")
    places = (
        [Path(given)]
        if given not in ("", "0")
        else [home / ".cache/ms-playwright", home / "Library/Caches/ms-playwright"]
    )
    downloaded = [path for place in places for pattern in _DOWNLOADED for path in place.glob(pattern)]
    usable = [path for path in downloaded if os.access(path, os.X_OK)]
    if usable:
        return str(max(usable, key=lambda path: path.stat().st_mtime))
    for name in NAMES:
        if found := shutil.which(name, path=variables.get("PATH")):
            return found
    applications = [root / "Applications" / name for root in (Path("/"), home) for name in _APPLICATIONS]
    return next((str(path) for path in applications if path.exists()), None)


if __name__ == "__main__":
    place = chromium()
    print(place or "")
    sys.exit(place is None)
