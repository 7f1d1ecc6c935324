"""The page in a real browser, Chromium, at the size of a desk and of a phone, in both languages."""

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.serve.servers import KEY, PATIENCE_S, RED, until
from wan.media import read_settings
from wan.video import open_video

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")
WIDTHS = {1280: 900, 390: 844}
LONG = {"frame_num": "33", "sample_steps": "900"}


@pytest.fixture
def server(paged):
    return paged


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as made:
        opened = made.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def folder(tmp_path):
    """Where pictures of the page go."""
    kept = Path(os.environ.get("SWAN_SCREENSHOTS", tmp_path))
    kept.mkdir(parents=True, exist_ok=True)
    return kept


class Desk:
    """The page, open in a browser, and all that it asks for and complains of."""

    def __init__(self, browser, server, folder, **how):
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True, **how)
        self.context.set_default_timeout(PATIENCE_S * 1000)
        self.page, self.server, self.folder = self.context.new_page(), server, folder
        self.hosts, self.wrong = set(), []
        self.page.on("request", lambda one: self.hosts.add((urlsplit(one.url).scheme, urlsplit(one.url).netloc)))
        self.page.on("console", lambda one: self.wrong.append(one.text) if one.type == "error" else None)
        self.page.on("pageerror", lambda one: self.wrong.append(str(one)))
        self.page.goto(server.url)

    def wait(self):
        """Until the page is there as a whole."""
        self.page.locator("#swan-run").wait_for()
        self.page.locator("#swan-job .swan-empty, #swan-job .swan-job").first.wait_for()
        return self

    def fill(self, **values):
        for name, value in values.items():
            self.page.locator(f"#swan-{name} textarea, #swan-{name} input").first.fill(value)

    def value(self, name):
        return self.page.locator(f"#swan-{name} textarea, #swan-{name} input").first.input_value()

    def open(self, part):
        """A part of the form that is closed."""
        if not self.page.locator(f"#swan-{part} .block:visible, #swan-{part} textarea:visible").count():
            self.page.locator(f"#swan-{part} button").first.click()

    def run(self):
        """The id of the job that Generate makes."""
        before = self.job
        self.page.locator("#swan-run").click()
        return until(lambda: self.job if self.job != before else None)

    @property
    def job(self):
        found = self.page.locator("#swan-job .swan-job")
        return found.get_attribute("data-id") if found.count() else None

    def pictures(self, name):
        """Of the page, from top to bottom, at all widths, where nothing may be wider than the window."""
        for width, height in WIDTHS.items():
            self.page.set_viewport_size({"width": width, "height": height})
            self.page.wait_for_timeout(400)
            wide = self.page.evaluate("document.documentElement.scrollWidth")
            self.page.screenshot(path=self.folder / f"page-{name}-{width}.png", full_page=True)
            assert wide <= width, f"{name}: {wide} px in a window of {width}"
        self.page.set_viewport_size({"width": 1280, "height": 900})


def test_a_video_from_start_to_end(server, browser, folder, tmp_path):
    desk = Desk(browser, server, folder, locale="en-US").wait()
    page = desk.page
    desk.open("sampling")
    desk.fill(prompt=RED, frame_num="9", sample_steps="12", seed="5")
    first = desk.run()
    page.locator("#swan-result video").wait_for()
    with page.expect_download() as told:
        page.locator(".swan-download").click()
    told.value.save_as(tmp_path / "first.mp4")
    settings = read_settings(tmp_path / "first.mp4")
    assert len(open_video(tmp_path / "first.mp4")) == 9
    assert [settings[name] for name in ("prompt", "seed", "sample_steps")] == [RED, 5, 12]
    until(lambda: page.locator("#swan-result video").evaluate("one => one.videoWidth") == 64)
    page.locator("#swan-result video").evaluate("one => one.isTheSame = true")
    for _ in range(2):
        page.wait_for_event("response", lambda one: one.url.endswith("/run/predict"))
    assert page.locator("#swan-result video").evaluate("one => one.isTheSame")  # what is played goes on

    desk.open("others")
    desk.fill(prompt="a blue square moving up on a white background", seed="6", others="preview_every = 5", **LONG)
    second = desk.run()
    page.locator("#swan-job [data-state=in_progress]").wait_for()
    page.locator("#swan-preview img").wait_for()
    desk.pictures("running-en")
    page.reload()
    page.locator(f"#swan-job [data-id={second}]").wait_for()  # it is found again
    page.locator("#swan-cancel").click()
    page.locator(f"#swan-gallery [data-id={second}]").wait_for(state="detached")
    assert server.ask("GET", f"/v1/videos/{second}")[0] == 404

    page.locator(f"#swan-gallery [data-id={first}]").click()
    page.locator("#swan-result video").wait_for()
    page.locator("#swan-again").click()
    until(lambda: desk.value("prompt") == RED)
    desk.open("sampling")
    assert [desk.value(name) for name in ("seed", "sample_steps", "frame_num")] == ["5", "12", "9"]
    third = desk.run()
    page.locator(f'#swan-result video[src*="{third}"]').wait_for()
    same = server.folder / "jobs" / third / "video.mp4"
    assert read_settings(same) == settings

    desk.pictures("done-en")
    page.locator("#swan-language").get_by_text("中文").click()
    until(lambda: page.locator("#swan-run").inner_text() == "生成")
    desk.pictures("done-zh")
    page.reload()
    until(lambda: page.locator("#swan-run").inner_text() == "生成")  # it is remembered
    assert {(scheme, host) for scheme, host in desk.hosts if scheme not in ("data", "blob")} == {
        ("http", urlsplit(server.url).netloc)
    }
    assert desk.wrong == []
    desk.context.close()


def test_many_videos_cover_nothing(server, browser, folder):
    desk = Desk(browser, server, folder, locale="en-US").wait()
    tile = '<button class="swan-tile"><span>Waiting</span><em>a</em></button>'
    tiles = f'<div class="swan-tiles">{80 * tile}</div>'
    covers = "one => { const at = one.getBoundingClientRect(); "
    covers += "return one.contains(document.elementFromPoint(at.left + 60, at.bottom + 12)) }"
    for width in WIDTHS:
        desk.page.set_viewport_size({"width": width, "height": 3000})
        desk.page.locator("#swan-gallery .prose").evaluate("(one, tiles) => { one.innerHTML = tiles }", tiles)
        gallery = desk.page.locator("#swan-gallery")
        assert gallery.evaluate("one => one.scrollHeight > one.clientHeight") and not gallery.evaluate(covers)
    desk.context.close()


@pytest.mark.parametrize("language, colours, run", [("en", "dark", "Generate"), ("zh", "light", "生成")])
def test_all_of_the_form(server, browser, folder, language, colours, run):
    desk = Desk(browser, server, folder, locale={"en": "en-US", "zh": "zh-CN"}[language], color_scheme=colours).wait()
    until(lambda: desk.page.locator("#swan-run").inner_text() == run)
    for part in ("sampling", "caching", "loras", "others"):
        desk.open(part)
    desk.page.locator("#swan-others summary").click()
    desk.fill(prompt=RED, others="x")
    desk.page.locator("#swan-run").click()
    desk.page.locator("#swan-message [role=alert]").wait_for()
    desk.pictures(f"form-{language}")
    assert desk.wrong == []
    desk.context.close()


def test_a_key_opens_the_page(locked, browser, folder):
    desk = Desk(browser, locked, folder, locale="zh-CN")
    desk.page.goto(f"{locked.url}/swan/")
    desk.page.locator("input[name=key]").fill("another")
    desk.page.locator("button").click()
    desk.page.locator("[role=alert]").wait_for()
    desk.pictures("key-zh")
    desk.page.locator("input[name=key]").fill(KEY)
    desk.page.locator("button").click()
    desk.wait()
    desk.pictures("opened-zh")
    desk.page.set_viewport_size({"width": 390, "height": 844})
    boxes = [desk.page.locator(one).bounding_box() for one in (".swan-title >> nth=0", ".swan-out", "#swan-language")]
    for left, right in zip(boxes, boxes[1:]):
        assert left["x"] + left["width"] <= right["x"]
    desk.page.locator(".swan-out button").click()
    desk.page.locator("input[name=key]").wait_for()
    desk.context.close()
