"""A real headless Chromium that opens a page of ours."""

import html
import html.parser
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]  # fmt: skip

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


class Tags(html.parser.HTMLParser):
    """Counts of tags, and rows of each table."""

    def __init__(self):
        super().__init__()
        self.count, self.rows, self.table = {}, {}, None

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag == "table":
            self.table = dict(attributes).get("id")
        if tag == "tr":
            self.rows[self.table] = self.rows.get(self.table, 0) + 1


def chromium(page: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """Opens a page with a profile of its own in `folder`."""
    profile = f"--user-data-dir={tempfile.mkdtemp(dir=folder)}"
    command = [CHROMIUM, *FLAGS, profile, *flags, f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def tags(page: Path, folder: Path) -> Tags:
    """What the page consists of once it is shown; there must be no word on the console."""
    shown = chromium(page, folder, "--dump-dom")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    found = Tags()
    found.feed(shown.stdout)
    return found


def screenshot(page: Path, folder: Path, width: int, height: int) -> np.ndarray:
    """Pixels [height, width, 3] of the page's top."""
    path = folder / "shot.png"
    chromium(page, folder, f"--window-size={width},{height}", "--hide-scrollbars", f"--screenshot={path}")
    return np.asarray(Image.open(path).convert("RGB"))


def needed_width(page: Path, folder: Path, width: int, part: str = "html") -> int:
    """How many pixels wide the widest part of the page is in a frame of a width: more than this where it is cut off."""
    script = f"Math.max(...[...page.querySelectorAll('{part}')].map(part => part.scrollWidth))"
    return int(asked(page, folder, width, script))


def asked(page: Path, folder: Path, width: int, expression: str) -> str:
    """What an expression of JavaScript comes to, with `page` the document in a frame of a width."""
    host = folder / f"host-{page.name}"
    script = f"const page = document.querySelector('iframe').contentDocument; document.title = {expression}"
    frame = f'<iframe width="{width}" height="800" style="border: 0" srcdoc="{html.escape(page.read_text("utf-8"))}">'
    host.write_text(
        f'<!doctype html><title></title><body onload="{html.escape(script)}">{frame}</iframe></body>', "utf-8"
    )
    shown = chromium(host, folder, "--window-size=1280,900", "--dump-dom")
    return shown.stdout.split("<title>")[1].split("</title>")[0]
