"""The site as a browser shows it from the disk, in a wide window and on a telephone, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.integration.browser import EXECUTABLE, NAMES, open_browser

pytestmark = pytest.mark.skipif(
    EXECUTABLE is None,
    reason=f"there is no Chromium ({', '.join(NAMES)}); on Debian: apt-get install chromium-headless-shell",
)
WIDTHS = (1280, 390)
PICTURES = ("index.html", "docs/api.html", "docs/commands.html", "docs/models.html", "docs/hooks.html")
# What stands out of the window, and in no box of its own that can be moved.
TOO_WIDE = """(() => {
  const ends = element => element.getBoundingClientRect().right;
  const held = element => {
    for (let box = element.parentElement; box; box = box.parentElement)
      if (['auto', 'scroll'].includes(getComputedStyle(box).overflowX) && ends(box) <= innerWidth + 1) return true;
    return false;
  };
  const standing = [...document.querySelectorAll('.md-content *')].filter(
    element => ends(element) > innerWidth + 1 && !held(element));
  const found = standing.slice(0, 5).map(element => `${element.tagName} ${element.textContent.trim().slice(0, 40)}`);
  const width = document.documentElement.scrollWidth;
  return width > innerWidth ? [`the page: ${width}`, ...found] : found;
})()"""
SEARCH = """(async () => {
  document.querySelector('.md-search__input').focus();
  const input = document.querySelector('.md-search__input');
  input.value = 'CollapseGuard';
  input.dispatchEvent(new KeyboardEvent('keyup', {bubbles: true}));
  for (let tries = 0; tries < 300; tries++) {
    const found = document.querySelectorAll('.md-search-result__item').length;
    if (found) return found;
    await new Promise(done => setTimeout(done, 100));
  }
  return 0;
})()"""


@pytest.fixture
def browser(tmp_path):
    with open_browser(tmp_path / "profile") as opened:
        yield opened


def test_a_page_that_is_too_wide_is_seen(browser, tmp_path) -> None:
    wide = "<div style='width: 600px; height: 9px'>wide</div>"
    scrolled = f"<div style='overflow-x: auto'>{wide}</div>"
    cut = f"<div style='overflow-x: hidden'>{wide}</div>"
    for name, inside in (("wide", wide), ("scrolled", scrolled), ("cut", cut)):
        (tmp_path / f"{name}.html").write_text(f"<!doctype html><div class='md-content'>{inside}</div>")
        browser.show((tmp_path / f"{name}.html").as_uri(), 390)
        assert bool(browser.value(TOO_WIDE)) == (name != "scrolled"), name


def test_every_page_fits_its_window_and_asks_for_nothing(browser, site, tmp_path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    too_wide = {}
    for page in pages:
        name = page.relative_to(site).as_posix()
        browser.show(page.as_uri(), WIDTHS[0])
        for width in WIDTHS:
            browser.resize(width)
            if found := browser.value(TOO_WIDE):
                too_wide[name, width] = found
            if name in PICTURES:
                browser.picture(tmp_path / f"{Path(name).stem}-{width}.png")
    assert too_wide == {}
    assert [address for address in browser.requested if not address.startswith(("file:", "data:"))] == []
    for name in PICTURES:
        for width in WIDTHS:
            with Image.open(tmp_path / f"{Path(name).stem}-{width}.png") as picture:
                assert picture.width == width and picture.height > 900
                assert len(picture.convert("RGB").getcolors(1 << 24)) > 20  # text and pictures, and no empty page


def test_the_search_works_without_a_server(browser, site) -> None:
    browser.show((site / "index.html").as_uri(), WIDTHS[0])
    assert browser.value(SEARCH) > 0
    assert [address for address in browser.requested if not address.startswith(("file:", "data:", "blob:"))] == []
