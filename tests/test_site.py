"""The documents become a site without a warning, and its pages open in a browser."""

import functools
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from marks import sweep

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
BUILD_SECONDS, PAGE_SECONDS = 300, 120  # limits
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--virtual-time-budget=5000", "--dump-dom",
]  # fmt: skip

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings"))),
    reason='no MkDocs: `pip install -e ".[docs]"`',
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def build(folder, configuration=ROOT / "mkdocs.yml"):
    """Makes the site strictly: a warning is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(configuration), "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=BUILD_SECONDS)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = build(folder)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def opened(address, profile):
    """A page as a browser has it once its scripts have run."""
    command = ["chromium", *OPTIONS, f"--user-data-dir={profile}", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=PAGE_SECONDS).stdout


def title_of(page):
    return (ROOT / "docs" / f"{page}.md").read_text().partition("\n")[0].removeprefix("# ")


def heading_of(text):
    heading = re.search(r"<h1[^>]*>(.*?)<", text)
    return heading and heading[1]


def test_every_page_stands_in_the_site_and_its_menu(site):
    menu = re.findall(r'href="(?:\./)?([\w-]+)/"', (site / "index.html").read_text())
    others = set(PAGES) - {"index"}
    assert others <= set(menu)
    for page in others:
        assert heading_of((site / page / "index.html").read_text()) == title_of(page)
    assert not list(site.rglob("hooks*"))


def test_no_page_asks_another_site_for_anything(site):
    """Fonts, scripts and styles come with the pages."""
    for path in site.rglob("*.html"):
        text = path.read_text()
        loaded = re.findall(r'<(?:script|img)[^>]* src="?([^" >]+)', text)
        loaded += re.findall(r'<link[^>]* rel="?stylesheet"?[^>]* href="?([^" >]+)', text)
        loaded += re.findall(r'<link[^>]* href="?([^" >]+)"?[^>]* rel="?stylesheet', text)
        assert len(loaded) >= 2 and not [each for each in loaded if "//" in each], path


def test_the_reference_has_all_that_docstrings_tell(site):
    import tfzero

    text = re.sub(r"<[^>]*>", "", (site / "api" / "index.html").read_text())
    assert not [name for name in tfzero.__all__ if f"tfzero.{name}" not in text]
    assert "how long a worker waits for the others before it gives up" in text  # of an argument


def test_a_link_to_nowhere_is_noticed(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "tfzero", tmp_path / "tfzero")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "limits.md").open("a") as page:
        page.write("\n[nowhere](gpus.md#no-such-heading)\n")
    built = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert built.returncode != 0 and "no-such-heading" in built.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: `apt-get install chromium`")
@pytest.mark.parametrize("page", [page if page in ("index", "api") else sweep(page) for page in PAGES])
def test_a_page_opens_in_a_browser(address, tmp_path, page):
    shown = opened(f"{address}/{'' if page == 'index' else f'{page}/'}", tmp_path)
    assert heading_of(shown) == title_of(page)
    assert re.search(r'<html[^>]* class="js', shown)  # its scripts ran
