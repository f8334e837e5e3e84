"""The page in a browser: offline, from a file, with the keys, at every width, with whatever stands in the data."""

from __future__ import annotations

import json
import re
import zlib
from importlib import resources
from itertools import product

import numpy as np
import pytest

from fixtures.chromium import Chromium, find_chromium
from fixtures.results import comparison as comparison
from fixtures.results import entry, measured
from fixtures.results import evaluation as evaluation
from fixtures.results import training as training
from saekit.measure.numbers import decimals, percent
from saekit.report import browser as cards
from saekit.report.numbers import minus
from saekit.report.page import RENDERERS, write

HTML = "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>"
TURNED = "abc\u202edcba\u2066\x1b[31m\x00\u200f"
HOSTILE = (HTML, TURNED, "🧪👩‍🔬 🇨🇭", "\n\t\r", "日本語", "a" * 10_000, '"><b>&amp;', "  ")
N, SHARED = 300, 200


def card(latent: int) -> dict:
    token = f" word{latent}" if latent >= len(HOSTILE) else HOSTILE[latent]
    example = {"document": latent, "peak": 2, "tokens": ["once ", "upon", token, "\n", " a time"],
               "codes": [0.0, 0.3, 1.0 + latent / 100, 0.0, 0.5]}  # fmt: skip
    return {
        "latent": latent, "label": f"near `{token}`" + " · `w`" * 40 if latent % 2 else token,
        "density": (latent + 1) / 1000,
        "maximum": 4.0, "mean": 1.5, "documents": 7.5, "purity": 0.5, "purity_percentile": 1.0,
        "detection": 0.5 + (latent * 37 % N) / (2 * N), "detection_percentile": 1.0 if latent % 3 else 0.5,
        "histogram": [[0.5, 3.0], [1.0, 9.0], [2.0, 2.0]], "top": [example] * 3, "sample": [example],
        "neighbours": [{"latent": float((latent + 1) % N), "cosine": 0.5}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def results() -> list[dict]:
    """All that a page shows of 300 latents, with hostile texts wherever a text may stand."""
    common = {"saekit": "0.1.0", "versions": {}, "settings": {"note": HTML}, "warnings": [], "hook": HTML + TURNED}
    about = {"n_latents": N, "digest": "d", "rule": {"name": TURNED}, "provenance": {"data": HTML, "hook": "layers.1"}}
    explained = {
        **common, "kind": "explanation", "schema": 1, "sae": about, "model": {"model": HTML}, "data": {"name": TURNED},
        "detection": measured(0.7), "detection_null": measured(0.5), "told_fraction": measured(0.6),
        "fired_fraction": 1.0, "cards": [card(latent) for latent in range(N)],
    }  # fmt: skip
    null = {"latents": [0.01, 0.02], "directions": [0.03, 0.01]}
    dose = {"dose": 1.0, "kl": measured(0.2, 0.1, 0.3), "rise": measured(0.5, 0.4, 0.6), "change": 0.1,
            "kl_percentile": 90.0, "rise_percentile": 95.0, "rise_null_95": 0.2}  # fmt: skip
    effect = {"latent": 17, "density": 0.1, "followers": list(HOSTILE), "kl": measured(0.1, 0.05, 0.2), "kl_null": null,
              "kl_percentile": {"latents": 100.0, "directions": 100.0}, "drop": measured(0.1), "verdict": "acts",
              "doses": [dose, dose | {"dose": 2.0}], "reason": None}  # fmt: skip
    acting = {**common, "kind": "effects", "schema": 1, "sae": about, "model": {"model": "m"}, "data": {"name": "d"},
              "effects": [effect]}  # fmt: skip
    found = [2] * SHARED + [1] * (N - SHARED)
    certificate = dict.fromkeys(("objective", "dual", "gap"), 0)
    side = {"partner": list(range(N)), "cosine": [0.5 + i / 1000 for i in range(N)], "mean_cosine": measured(0.6),
            "max_cosine": measured(0.7), "pw_mcc": measured(0.6), "certificate": certificate}  # fmt: skip
    shared = {name: measured(0.66, 0.6, 0.7) for name in ("shared", "equal", "mean_cosine", "mean_cosine_encoder",
              "max_cosine")}  # fmt: skip
    pair = {"first": TURNED, "second": HTML, "same_seed": False, **shared, "decoder": side, "encoder": side,
            "on_rows": None}  # fmt: skip
    compared = {
        **common, "kind": "comparison", "schema": 4, "settings": {"threshold": 0.7, "strict": True, "intervals":
        {"level": 0.95, "over": HTML}}, "rows": None, **shared, "shared_null": None, "mean_cosine_null": None,
        "in_exactly": [], "only_in_one": [], "nulls": {}, "pairs": [pair],
        "saes": [{"name": name, "sae": about | {"digest": digest}, "found_in": found,
                  "stability": [float(f - 1) for f in found], "alignment": [0.5] * N}
                 for name, digest in ((TURNED, "d"), (HTML, "e"))],
    }  # fmt: skip
    entries = [entry("a" * 90, 0.0), entry(f"long-name-of-an-sae-{HTML}", 0.1)]
    measured_on = {**common, "kind": "evaluation", "schema": 1, "metrics": entries[0]["metrics"], "entries": entries,
                   "settings": {"seed": 0}, "rows": {"data": HTML}, "n_rows": 100, "language_model": None}  # fmt: skip
    top = {"spam": [{"latent": 17, "weight": 0.5, "label": HTML}], HTML: [{"latent": 4, "weight": 0.25, "label": ""}]}
    reads = {"kind": "classifier", "arm": HTML, "sae": {"digest": "d"}, "top_latents": top, "settings": {}}
    return [measured_on, compared, explained, acting, reads]


@pytest.fixture(scope="module")
def page(results, tmp_path_factory):
    return write(results, tmp_path_factory.mktemp("x") / "<b> #17 ?x %41 \u202e z", title=HTML + TURNED + "b" * 3000)


@pytest.fixture(scope="module")
def chromium():
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium`, or name one in SAEKIT_CHROMIUM")
    browser = Chromium(program)
    yield browser
    browser.close()


def latents(browser: Chromium) -> list[int]:
    """Return the numbers of the rows in sight, from the top."""
    return browser.value(
        "[...document.querySelectorAll('.row')].sort((a, b) => a.ariaRowIndex - b.ariaRowIndex)"
        ".map((row) => Number(row.querySelector('.id').textContent.slice(1)))"
    )


def ask(browser: Chromium, **fields: str) -> str:
    """Fill in the form and return what the status line says."""
    for name, value in fields.items():
        browser.value(f"document.querySelector('.tools')[{name!r}].value = {json.dumps(value)}")
    browser.value("document.querySelector('.tools').dispatchEvent(new Event('input'))")
    return browser.value("document.querySelector('.status').textContent")


def test_it_opens_without_network_and_says_nothing_on_the_console(chromium, page):
    chromium.open(page)
    assert chromium.console == []
    assert {url.split(":")[0] for url in chromium.requests} <= {"file", "data", "about", "blob"}
    assert chromium.value("fetch('https://example.com').then(() => 'sent', () => 'refused')") == "refused"
    chromium.console.clear()
    assert chromium.value("document.querySelectorAll('.verdict').length") == 3


def test_hostile_texts_are_shown_and_do_nothing(chromium, page):
    chromium.open(page)
    assert chromium.value("window.hurt") is None
    assert "<script>window.hurt" in chromium.value("document.querySelector('h1').textContent")
    for latent, text in enumerate(HOSTILE):
        chromium.value(f"location.hash = '#f{latent}'")
        chromium.wait(f"document.querySelector('.card header a')?.textContent === 'latent {latent}'")
        shown = chromium.value("document.querySelector('.card').textContent")
        assert text in shown or latent in (1, 3, 5), text[:20]
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200f]", shown)
    chromium.value("location.hash = '#f1'")
    chromium.wait("document.querySelector('.card header a')?.textContent === 'latent 1'")
    assert "abc‹U+202E›dcba‹U+2066›␛[31m␀‹U+200F›" in chromium.value("document.querySelector('.card').textContent")
    chromium.value("location.hash = '#f5'")
    chromium.wait("document.querySelector('.card header a')?.textContent === 'latent 5'")
    assert "… (10,000 characters)" in chromium.value("document.querySelector('.card').textContent")
    assert chromium.value("window.hurt") is None
    assert not chromium.value("document.querySelectorAll('main img, main b:not(.next b)').length")
    assert chromium.console == []


def test_search_filters_and_sorting(chromium, page):
    chromium.open(page)
    order = sorted(range(N), key=lambda latent: -card(latent)["detection"])
    assert latents(chromium)[:5] == order[:5]
    assert ask(chromium, find="word123") == "1 of 300 latents"
    assert latents(chromium) == [123]
    assert ask(chromium, find="WORD12") == "11 of 300 latents"
    ask(chromium, find="42")
    assert latents(chromium)[0] == 42
    ask(chromium, find="", sort="density", order="-1")
    assert latents(chromium)[:3] == [299, 298, 297]
    ask(chromium, order="1")
    assert latents(chromium)[:3] == [0, 1, 2]
    assert "density 0.1%" in chromium.value("document.querySelector('.row .about').textContent")
    assert ask(chromium, sharing="orphan") == "100 of 300 latents"
    assert latents(chromium)[0] == SHARED
    assert ask(chromium, sharing="", density="dense") == "200 of 300 latents"
    assert ask(chromium, density="", told="weak") == "100 of 300 latents"
    assert ask(chromium, told="", chosen="spam") == "1 of 300 latents"
    assert latents(chromium) == [17]
    keys = chromium.value("[...document.querySelector('.tools').sort.options].map((each) => each.value)")
    assert {"latent", "label", "detection", "purity", "found_in", "stability", "kl"} <= set(keys)
    for key in keys:
        ask(chromium, chosen="", sort=key)
    assert chromium.console == []


def test_the_script_writes_the_digits_of_the_terminal(chromium, page):
    """Ties, powers of ten, and numbers that five digits bring to a tie: all as `saekit.measure.numbers` has them."""
    chromium.open(page)
    generator = np.random.default_rng(0)
    found = [0.0, 0.03125, 0.28125, 1.125, 10.25, 999.5, 999.49, 1000.5, 1001.5, 9.995e-5, 0.0966497, 0.09657, 1 / 3]
    found += [*(2.0 ** -np.arange(1, 30)), *(10.0 ** -np.arange(9)), *(k / 800 for k in range(1, 800, 7))]
    found += list(10 ** generator.uniform(-7, 5, 400)) + [1.0625 + k / 8 for k in range(40)]
    found += [-each for each in found if each]
    source = (resources.files("saekit") / "report/templates/browser.js").read_text()
    own = source[source.index("  function decimals") : source.index("  const PERCENT")]
    for name, expected in (("decimals", decimals), ("percent", percent)):
        found = found if name == "decimals" else [each for each in found if abs(each) <= 1]
        sent = json.dumps([cards._short(float(each)) for each in found])
        shown = chromium.value(f"(() => {{ {own}; return {sent}.map({name}); }})()")
        wrong = [(v, e, s) for v, s in zip(found, shown, strict=True) if s != (e := minus(expected(v)))]
        assert not wrong


def test_the_list_holds_only_rows_in_sight(chromium, page):
    chromium.open(page)
    ask(chromium, sort="latent", order="1")
    assert chromium.value("document.querySelectorAll('.row').length") < 40
    chromium.value("document.querySelector('.list').scrollTop = 1e9")
    chromium.wait("[...document.querySelectorAll('.row .id')].some((each) => each.textContent === '#299')")
    assert chromium.value("document.querySelectorAll('.row').length") < 40


def test_deep_links_keys_and_the_way_back(chromium, page):
    chromium.open(page, anchor="#f17")
    assert chromium.value("document.querySelector('.card header a').textContent") == "latent 17"
    shown = chromium.value("document.querySelector('.card').innerText")
    for part in ("shared: in 2 of 2 SAEs", "Where it fires most", "Sizes of its codes", "Nearest decoder directions",
                 "Weight by class", "What it does", "Verdict: acts", "Why this may be wrong"):  # fmt: skip
        assert part in shown
    assert chromium.value("document.querySelectorAll('.card .t3, .card .t1').length") > 3
    chromium.value("document.querySelector('.card .chips a').click()")
    chromium.wait("location.hash === '#f18' && document.querySelector('.card header a').textContent === 'latent 18'")
    chromium.value("history.back()")
    chromium.wait("document.querySelector('.card header a').textContent === 'latent 17'")
    chromium.value("location.hash = '#f999'")
    chromium.wait("document.querySelector('.card').textContent.includes('no card of latent 999')")
    chromium.press("/")
    assert chromium.value("document.activeElement.name") == "find"
    ask(chromium, sort="latent", order="1")
    chromium.value("document.querySelector('.list').focus()")
    chromium.press("ArrowDown")
    chromium.wait("location.hash === '#f18'")
    chromium.press("ArrowDown")
    chromium.wait("location.hash === '#f19'")
    chromium.press("Enter")
    assert chromium.value("document.activeElement.className") == "card"
    chromium.press("Escape")
    assert chromium.value("document.activeElement.className") == "list"
    assert chromium.console == []


def test_charts_tell_their_numbers_to_the_keyboard(chromium, page):
    chromium.open(page)
    chromium.value("document.querySelector('.group .drawn').focus()")
    chromium.press("ArrowRight")
    assert "FVU" in chromium.value("document.getElementById('tip').textContent")
    chromium.press("Escape")
    assert chromium.value("document.getElementById('tip').hidden")


CLIPPED = """[...document.querySelectorAll('body *')].filter((each) => {
    const style = getComputedStyle(each), box = each.getBoundingClientRect();
    if (!box.width || each.closest('svg') && each.tagName !== 'svg' || each.closest('.row')) return false;
    return box.right > innerWidth + 1 || (each.scrollWidth > each.clientWidth + 1 && style.overflowX !== 'visible');
}).map((each) => each.tagName + '.' + each.className + ' ' + each.scrollWidth + ' ' + each.textContent.slice(0, 40))"""


@pytest.mark.parametrize(("width", "dark"), list(product((1440, 1280, 768, 390), (False, True))))
def test_nothing_is_clipped_at_any_width(chromium, page, width, dark):
    chromium.open(page, width=width, dark=dark, anchor="#f5")
    chromium.value("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert chromium.value("document.documentElement.scrollWidth") == width
    assert chromium.value(CLIPPED) == []
    ground = chromium.value("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") != dark


def test_a_row_of_the_list_has_two_lines_whatever_its_label(chromium, page):
    for width in (1440, 1280, 768, 390):
        chromium.open(page, width=width)
        ask(chromium, sort="latent", order="1")
        heights = chromium.value("[...document.querySelectorAll('.row > div')].map((each) => each.scrollHeight)")
        assert len(heights) > 20
        assert max(heights) < 30
        for key in chromium.value("[...document.querySelector('.tools').sort.options].map((each) => each.value)"):
            ask(chromium, sort=key)
            cut = "[...document.querySelectorAll('.row .about')].filter((each) => each.scrollWidth > each.clientWidth)"
            assert chromium.value(f"{cut}.map((each) => each.textContent)") == [], key


def test_a_card_is_its_own_screen_on_a_phone(chromium, page):
    chromium.open(page, width=390)
    visible = "getComputedStyle(document.querySelector({!r})).display !== 'none'"
    assert chromium.value(visible.format(".list"))
    assert not chromium.value(visible.format(".card"))
    chromium.value("document.querySelector('.row').click()")
    chromium.wait(visible.format(".card"))
    assert not chromium.value(visible.format(".list"))
    chromium.value("document.querySelector('.back').click()")
    chromium.wait(visible.format(".list"))


def test_it_prints_on_few_pages(chromium, page):
    chromium.open(page, anchor="#f17")
    printed = chromium.pdf()
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 30


def test_cards_next_to_the_page(chromium, results, tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "INLINE", 100)
    monkeypatch.setattr(cards, "PER_CHUNK", 128)
    place = write(results, tmp_path)
    folder = tmp_path / "report-latents"
    assert sorted(file.name for file in folder.iterdir()) == ["0-0.js", "0-1.js", "0-2.js"]
    chromium.open(place, anchor="#f290")
    assert chromium.value("document.querySelector('.card header a').textContent") == "latent 290"
    assert chromium.console == []
    (folder / "0-0.js").unlink()
    chromium.value("location.hash = '#f9'")
    chromium.wait("document.querySelector('.missing') !== null")
    assert "moved without its folder" in chromium.value("document.querySelector('.missing').textContent")


def test_without_scripts_the_answers_and_tables_stand_there(results):
    shown = write.__globals__["render"](results)
    assert "A label is made of tokens" in shown
    assert "The 12 latents whose labels hold best, of 300" in shown


def test_4096_latents_have_room_in_a_page_of_10_megabytes(results):
    words = [f" {zlib.crc32(str(n).encode()):x}"[:7] for n in range(4000)]

    def window(latent: int, number: int) -> dict:
        tokens = [words[(latent * 13 + number * 24 + t) * 7919 % 4000] for t in range(24)]
        codes = [round((latent + t * number) % 97 / 9.7, 5) if t % 3 == 0 else 0.0 for t in range(24)]
        return {"document": latent, "peak": 16, "tokens": tokens, "codes": codes}

    many = []
    for latent in range(512):
        windows = [window(latent, number) for number in range(16)]
        many.append({**card(100 + latent % 100), "latent": latent, "top": windows[:8], "sample": windows[8:]})
    [found] = cards.browsers([results[2] | {"cards": many}])
    letters = len(found.index) + sum(map(len, found.chunks))
    assert letters / 512 * 4096 < cards.INLINE_BYTES


def test_every_kind_of_result_has_a_part_of_the_page():
    from saekit.report.page import GROUPS

    assert set(RENDERERS) <= {kind for _, _, kinds in GROUPS for kind in kinds}
