"""The report: whole, in one file, safe to open, and drawn by a real browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from logged import run as run
from told import tell

from raygpt.runs.history import read_history
from raygpt.runs.listing import HEADS, row
from raygpt.runs.report import Facts, count, duration, render_comparison, render_report
from raygpt.storage import Folder

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PLAN = {"parameters": "12,345", "corpus": "</script><script>alert(1)</script>"}


def page(run: Folder, state: str = "running", text: str = "") -> str:
    history = read_history(run)
    history.read_samples()
    return render_report(history, Facts(PLAN, state, text))


def data(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    content: dict[str, Any] = json.loads(found)
    return content


def test_it_tells_what_a_run_is_and_did(run: Folder) -> None:
    tell(run, 20, max_lr=0.00123)
    text = html.unescape(re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", page(run), flags=re.S))
    text = " ".join(text.split())
    for part in (
        "step 20 of 40",
        "about 0 s left",
        "validation loss 2.8100 1.4050 a byte, best 2.8100 at step 19",
        "1 restart",
        "10.0.0.2 2 L4 4 16 GiB",
        "parameters 12,345",
        "max_lr 0.00123",
        "as asked",
        "O Romeo",
    ):
        assert part in text, part
    (told,) = data(page(run))["runs"]
    assert told["curves"]["step"] == list(range(20))
    assert told["validations"]["val_loss"] == [2.91, 2.81]
    assert [event["kind"] for event in told["events"]] == ["start", "checkpoint"] * 2


def test_nothing_in_it_becomes_code(run: Folder) -> None:
    tell(run, 4)
    found = page(run, "failed", "<img src=x onerror=alert(1)>")
    assert "alert(1)</script>" not in found and "<img" not in found
    assert "<b>Juliet" not in found and "<i>L4" not in found
    assert "&lt;b&gt;Juliet" in found


def test_it_needs_no_other_file(run: Folder) -> None:
    tell(run, 4)
    found = page(run)
    assert not re.search(r"""(src|href)=|@import|url\(""", found)
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(", found)


def test_a_page_that_goes_on_is_read_again(run: Folder) -> None:
    tell(run, 4)
    assert data(page(run, "running"))["running"] and not data(page(run, "finished"))["running"]


def test_a_run_that_has_just_begun(run: Folder) -> None:
    tell(run, 0)
    assert "step 0 of 40" in page(run)


def test_numbers_in_words() -> None:
    assert [count(n) for n in (0, 999_999, 1.25e6, 3e11, 2e12)] == [
        "0", "999,999", "1.25 M", "300 G", "2 T",
    ]  # fmt: skip
    assert [duration(s) for s in (5, 119, 600, 9000, 400000)] == [
        "5 s", "119 s", "10 min", "2.5 h", "4.6 days",
    ]  # fmt: skip


# --- in a browser

PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const shown = [...document.querySelectorAll(".uplot canvas")].map((c) => c.width * c.height);
  document.body.dataset.probe = JSON.stringify({
    plots: shown.length, blank: shown.some((size) => !size),
    wide: [...document.querySelectorAll("body, body *")].filter(
      (e) => e.getBoundingClientRect().right > innerWidth && !e.closest(".scroll, .edge")
    ).map((e) => e.outerHTML.slice(0, 100)), errors: window.errors,
    back: getComputedStyle(document.body).backgroundColor,
    legends: [...document.querySelectorAll(".u-legend")].map((l) => l.textContent),
  });
}, 500));</script>"""
CATCH = "<script>window.errors = []; addEventListener('error', (e) => errors.push(e.message));"


def browse(folder: Path, text: str, *options: str, frame: int = 0) -> dict[str, Any]:
    """What a browser makes of a page.

    Args:
        frame: width in pixels; a browser's own window is never as narrow as a phone.
    """
    assert CHROMIUM is not None
    text = text.replace("<head>", f"<head>{CATCH}</script>").replace("</body>", f"{PROBE}</body>")
    (folder / "page.html").write_text(text)
    if frame:
        inside = html.escape(text, quote=True)
        script = (
            "<script>const f = document.querySelector('iframe'); f.onload = () => setTimeout(() =>"
            " document.body.dataset.probe = f.contentDocument.body.dataset.probe, 1000);</script>"
        )
        (folder / "page.html").write_text(
            f'<body><iframe style="width:{frame}px;height:900px" srcdoc="{inside}"></iframe>'
            f"{script}</body>"
        )
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *(f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", *options),
            (folder / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    (probe,) = re.findall(r'<body[^>]* data-probe="([^"]*)"', done.stdout) or [None]
    assert probe is not None, done.stderr
    found: dict[str, Any] = json.loads(html.unescape(probe))
    return found


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@needs_browser
def test_a_browser_draws_it(run: Folder, tmp_path: Path) -> None:
    tell(run, 20)
    light = browse(tmp_path, page(run), "--blink-settings=preferredColorScheme=1")
    assert light["errors"] == [] and light["plots"] == 5 and not light["blank"]
    assert light["wide"] == []
    assert "training3.31" in light["legends"][0] and "validation2.81" in light["legends"][0]
    dark = browse(tmp_path, page(run), "--blink-settings=preferredColorScheme=0")
    assert dark["errors"] == [] and dark["back"] != light["back"]


@needs_browser
def test_it_fits_a_phone(run: Folder, tmp_path: Path) -> None:
    tell(run, 20)
    found = browse(tmp_path, page(run), frame=360)
    assert found["errors"] == [] and found["plots"] == 5 and found["wide"] == []


@needs_browser
def test_runs_over_each_other(run: Folder, tmp_path: Path) -> None:
    other = Folder.from_path(str(tmp_path / "other"))
    tell(run, 20, max_lr=0.001)
    tell(other, 40, max_lr=0.002)
    histories = [read_history(folder) for folder in (run, other)]
    text = render_comparison(histories, HEADS, [row(h) for h in histories], "runs")
    table = " ".join(re.sub(r"<[^>]+>", " ", text.partition("Settings that differ")[2]).split())
    assert table.startswith("run other optim.max_lr 0.001 0.002 ")
    found = browse(tmp_path, text)
    assert found["errors"] == [] and found["plots"] == 5
    assert "run3.31" in found["legends"][0] and "other, validation2.61" in found["legends"][0]
