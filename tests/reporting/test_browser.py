"""Reports in a real browser: what is drawn, searched and typed, and that no text of a dataset does anything.

Skipped where there is no Chromium with its driver.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import bigsae
from tests.reporting.browser import DOWN, ENTER, Browser
from tests.reporting.conftest import EVIL_TOKEN, WIDTH

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def grid(home, tmp_path_factory) -> Path:
    """A report of five SAEs of two runs, all latents of each."""
    return bigsae.write_report(
        bigsae.ReportConfig(
            runs=(str(home / "grid"), str(home / "plain")),
            output=str(tmp_path_factory.mktemp("page") / "r.html"),
            latents=tuple(range(WIDTH)),
            num_rows=8,
        )
    )


def opened(
    browser: Browser, page: Path, width: int = 1280, *, dark: bool = False, fragment: str = ""
) -> None:
    browser.show_as(width, 900, dark=dark)
    browser.open(Path("/dev/null"))
    browser.requests(), browser.console()
    browser.open(page, fragment)


def numbers(browser: Browser) -> list[int]:
    """The latents in the list."""
    return browser.run(
        "[...document.querySelectorAll('#latent-list .item-number')].map((e) => Number(e.textContent))"
    )


def shown(browser: Browser) -> int:
    return int(browser.run("document.querySelector('.latent-number').textContent"))


def search(browser: Browser, query: str) -> list[int]:
    browser.run("document.getElementById('search').value = ''")
    browser.type("#search", query)
    return numbers(browser)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_drawn_in_every_size_and_colour(browser, grid, width, dark):
    opened(browser, grid, width, dark=dark)
    assert browser.run("document.querySelectorAll('#curves svg[role=img]').length") >= 6
    assert browser.run("document.querySelectorAll('#distributions svg[role=img]').length") == 4
    assert browser.run("document.querySelectorAll('#curves .line').length") > 6 * 5
    # Nothing is wider than the window, and no chart is empty.
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run("[...document.querySelectorAll('svg[role=img]')].every((e) => e.clientWidth > 200)")
    assert not browser.run(
        "[...document.querySelectorAll('path')].some((e) => /NaN|undefined/.test(e.getAttribute('d')))"
    )
    lightness = browser.run("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)[0]")
    assert lightness < 60 if dark else lightness > 200
    assert browser.console() == []
    assert browser.requests() == [grid.as_uri()]


def test_no_text_of_the_dataset_does_anything(browser, grid):
    """The tokenizer's token and the text that want to be markup are shown as they are."""
    opened(browser, grid)
    for at in range(5):
        browser.run(f"(() => {{ const c = document.querySelector('.sae-choice'); c.value = {at}; "
                    "c.dispatchEvent(new Event('change')); })()")  # fmt: skip
        for latent in numbers(browser):
            browser.run(f"document.querySelector('[data-latent=\"{latent}\"]').click()")
            assert browser.run("document.querySelectorAll('img, iframe, #app script, [onerror]').length") == 0
    assert browser.run("typeof window.harm") == "undefined"
    assert browser.console() == [] and browser.requests() == [grid.as_uri()]
    found = search(browser, EVIL_TOKEN)
    assert found
    assert EVIL_TOKEN in browser.run("document.getElementById('latent').textContent")


def test_search_by_number_by_token_and_by_keyboard(browser, grid):
    opened(browser, grid)
    assert numbers(browser) == list(range(WIDTH))
    assert search(browser, "17") == [17]
    assert shown(browser) == 17
    assert search(browser, "2") == [2, *range(20, WIDTH)]
    assert search(browser, "99999") == []
    assert "--latents adds it" in browser.run("document.querySelector('.found').textContent")
    search(browser, "17")
    some = browser.run("document.querySelector('.contexts p').textContent").lower()[20:32].strip()
    found = search(browser, some)  # over the borders of tokens
    assert found
    assert shown(browser) == found[0]
    assert some in browser.run("document.getElementById('latent').textContent").lower()
    search(browser, "2")
    browser.type("#search", DOWN + DOWN)
    assert shown(browser) == 21
    assert browser.run("location.hash").endswith("/21")
    assert browser.run("document.activeElement.id") == "search"
    browser.type("#search", ENTER)
    assert browser.run("document.activeElement.id") == "latent"
    browser.run("document.querySelector('[data-latent=\"20\"]').click()")
    browser.type('[data-latent="20"]', DOWN)
    assert shown(browser) == 21
    assert browser.run("document.activeElement.dataset.latent") == "21"


def test_an_address_names_a_latent(browser, grid):
    opened(browser, grid, fragment="#plain%20%C2%B7%20model.layers.1/11")
    assert shown(browser) == 11
    assert (
        browser.run("document.querySelector('.sae-choice').selectedOptions[0].textContent")
        == "plain · model.layers.1"
    )


def test_curves_are_hidden_and_shown(browser, grid):
    opened(browser, grid)
    before = browser.run("document.querySelectorAll('#curves .line').length")
    browser.run("document.querySelector('#numbers input').click()")
    assert browser.run("document.querySelectorAll('#curves .line').length") < before
    browser.run("document.querySelector('#numbers input').click()")
    time.sleep(0.2)  # charts are drawn once they have a width
    assert browser.run("document.querySelectorAll('#curves .line').length") == before


def test_the_quickstarts_report(browser, quickstart_run, tmp_path):
    """The real model: a latent, its texts and the tokens it promotes, found by a word of its own context."""
    page = bigsae.write_report(
        bigsae.ReportConfig(
            runs=(str(quickstart_run[0]),), output=str(tmp_path / "r.html"), num_rows=24, num_latents=12
        )
    )
    opened(browser, page)
    word = browser.run("document.querySelector('.contexts .peak').textContent").strip()
    latent = shown(browser)
    assert latent in search(browser, word.lower())
    assert browser.run("document.querySelectorAll('.promoted li').length") == 20
    assert browser.run("document.querySelector('.pill').textContent").startswith("finished")
    strength = (
        "Number(getComputedStyle(document.querySelector('.contexts .peak')).getPropertyValue('--strength'))"
    )
    assert browser.run(strength) == 1
    assert browser.console() == [] and browser.requests() == [page.as_uri()]
    browser.screenshot(tmp_path / "shot.png")
    assert (tmp_path / "shot.png").stat().st_size > 30_000
