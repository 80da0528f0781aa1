"""Take the picture of a report that README.md shows: `make picture`, which needs Chromium.

The report is that of the demo, `mosaic run`, which runs below build/ unless it did before.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIZE = (1100, 1130)  # pixels: the first screen of the page
COLOURS = 256


def main() -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("make picture: no Chromium on the path")
    storage = ROOT / "build" / "picture"
    mosaic = [sys.executable, "-m", "mosaic_ray"]
    subprocess.run([*mosaic, "run", "--storage", str(storage), "--name", "demo"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder) / "report.html", Path(folder) / "shot.png"
        subprocess.run([*mosaic, "report", str(storage / "runs" / "demo"), "--out", str(page)], check=True)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
        size = f"--window-size={SIZE[0]},{SIZE[1]}"
        subprocess.run([browser, *flags, size, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True)
        with Image.open(shot) as image:
            picture = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        picture.save(ROOT / "docs" / "assets" / "report.png", optimize=True)


if __name__ == "__main__":
    main()
