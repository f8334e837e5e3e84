"""Size and speed of the page of an SAE with many latents: ``python benchmarks/page.py --latents 4096 16384``.

Random latents on the built-in model, so that nearly all fire and have a card. The page is opened from its file in a
headless Chromium without network; loading is the browser's own clock, a card is from the change of the address on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fixtures.chromium import Chromium, find_chromium  # noqa: E402
from saekit import SAE, write_report  # noqa: E402
from saekit.explanation.run import explain  # noqa: E402
from saekit.explanation.settings import ExplainSettings  # noqa: E402
from saekit.sae.rules import TopKRule  # noqa: E402

LAST = "[...document.querySelectorAll('.row .id')].at(-1).textContent.slice(1)"


def main() -> None:
    """Print a row for every number of latents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--tokens", type=int, default=50_000)
    settings = parser.parse_args()
    program = find_chromium()
    if program is None:
        raise SystemExit("Chromium must be on the path, or named in SAEKIT_CHROMIUM; there is none.")
    browser = Chromium(program)
    print("| latents | cards | page, MB | beside it, MB | written, CPU s | loaded, s | a card, s | memory, MB |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    try:
        for n in settings.latents:
            with tempfile.TemporaryDirectory() as folder:
                print(row(browser, Path(folder), n, settings.tokens), flush=True)
    finally:
        browser.close()


def row(browser: Chromium, folder: Path, n: int, tokens: int) -> str:
    """Return what the page of `n` latents costs."""
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(n, 192, generator=generator), dim=1)
    place = {"hook": "layers.2", "context": 256}
    sae = SAE(W, torch.zeros(n), W.clone(), torch.zeros(192), TopKRule(16), provenance=place)
    chosen = ExplainSettings(tokens=tokens, cards=n, controls=("shuffled",))
    found = explain(sae, "builtin", "builtin", settings=chosen, progress=False)
    found.save(folder / "explanation.json")
    begin = time.process_time()
    page = write_report(folder)
    written = time.process_time() - begin
    browser.open(page)
    loaded = browser.value("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
    latent = browser.value(LAST)
    begin = time.perf_counter()
    browser.value(f"location.hash = '#f{latent}'")
    browser.wait(f"document.querySelector('.card header a')?.textContent === 'latent {latent}'")
    card = time.perf_counter() - begin
    if browser.console:
        raise SystemExit(f"the page must say nothing on the console; it says {browser.console}")
    beside = sum(file.stat().st_size for file in folder.glob("report-latents/*")) / 1e6
    heap = browser.value("performance.memory.usedJSHeapSize") / 1e6
    sizes = f"{page.stat().st_size / 1e6:.1f} | {beside:.1f} | {written:.0f}"
    return f"| {n:,} | {len(found.cards):,} | {sizes} | {loaded:.2f} | {card:.2f} | {heap:.0f} |"


if __name__ == "__main__":
    main()
