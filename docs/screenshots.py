"""Renew the screenshots of the documentation from a page: ``python docs/screenshots.py demo/report.html``.

The page is that of ``saekit demo --out demo``. It needs Chromium and Pillow. The card shown is that of the latent whose
label tells best, among those that several SAEs have and that fire on 0.1% to 10% of the tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fixtures.chromium import Chromium, find_chromium  # noqa: E402

CHOSEN = """(() => {
  const form = document.querySelector('.tools');
  form.density.value = 'middle'; form.sharing.value = 'shared'; form.sort.value = 'detection';
  form.dispatchEvent(new Event('input'));
  return document.querySelector('.row .id').textContent.slice(1);
})()"""


def main() -> None:
    """Write the three pictures, with 64 colours each."""
    page, program = Path(sys.argv[1]), find_chromium()
    if program is None:
        raise SystemExit("Chromium must be on the path, or named in SAEKIT_CHROMIUM; there is none.")
    browser = Chromium(program)
    try:
        take(browser, page, "report-answers", width=1440, height=760)
        take(browser, page, "report-phone", width=390, height=844, dark=True)
        browser.open(page, width=1440, height=940)
        latent = browser.value(CHOSEN)
        browser.value(f"location.hash = '#f{latent}'")
        browser.wait(f"document.querySelector('.card header a')?.textContent === 'latent {latent}'")
        save(browser, "report-latent")
    finally:
        browser.close()


def take(browser: Chromium, page: Path, name: str, *, width: int, height: int, dark: bool = False) -> None:
    """Write what is in sight of a page in a window of a size."""
    browser.open(page, width=width, height=height, dark=dark)
    save(browser, name)


def save(browser: Chromium, name: str) -> None:
    """Write what is in sight."""
    path = ROOT / "docs" / f"{name}.png"
    browser.screenshot(path)
    Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    sys.stdout.write(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
