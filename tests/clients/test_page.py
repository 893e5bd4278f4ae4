"""The page in a real browser."""

import json
import re

import httpx
import pytest

playwright = pytest.importorskip("playwright", reason="NOT TESTED: playwright is not installed")
from playwright.sync_api import expect, sync_playwright

from tests.clients.conftest import serving

SCRIPT = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def browser(chromium):
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """A page that is open, with all that it asks for and complains about."""

    def __init__(self, browser, address: str):
        self.asked, self.said = [], []
        self.page = browser.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.goto(address)
        self.find = self.page.locator
        expect(self.find("#model")).to_have_text("bytes")

    def set(self, **values) -> None:
        """Move sliders, or fill in fields."""
        for name, value in values.items():
            self.page.evaluate(
                "([id, value]) => { const e = document.getElementById(id); e.value = value;"
                " e.dispatchEvent(new Event('input')); }",
                [name.replace("__", "-"), str(value)],
            )

    def go(self) -> None:
        self.find("#go").click()
        self.ends()

    def ends(self) -> None:
        expect(self.find("#stop")).to_be_disabled()

    @property
    def text(self) -> str:
        return self.find("#text").evaluate("e => e.textContent")


@pytest.fixture
def page(browser, server):
    opened = Page(browser, server.address)
    yield opened
    assert opened.said == []
    assert all(
        re.match(rf"{server.address}/|data:,|blob:{server.address}", u) for u in opened.asked
    )
    assert len(opened.asked) > 3
    opened.page.close()


def test_write_and_go_on(page, server):
    typed = f"It was {SCRIPT}"
    page.find("#text").press_sequentially(typed)
    page.set(max_tokens=60, seed=1, temperature=1)
    page.go()
    tokens = page.find("#text .t")
    body = dict(prompt=typed, max_tokens=60, seed=1, logprobs=0)
    answer = httpx.post(f"{server.url}/completions", json=body).json()["choices"][0]
    shown = page.text
    assert shown.startswith(typed) and len(shown) > len(typed) + 30
    plain = re.sub(r"[^ -~]", "", answer["text"])
    assert re.sub(r"\\x..|[^ -~]", "", shown[len(typed) :]) == plain  # bytes are \x..
    assert page.find("#text script, #text img").count() == 0
    expect(page.page).to_have_title("bytes")
    colours = set(tokens.evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)"))
    assert len(colours) > 2
    expect(page.find("#numbers")).to_contain_text(re.compile(r"^60 tokens.*seed 1$"))


def test_stop_regenerate_and_undo(page, server):
    page.find("#text").press_sequentially("Call me")
    page.set(max_tokens=2000)
    page.find("#go").click()
    expect(page.find("#text .t").nth(20)).to_be_visible()
    page.find("#stop").click()
    page.ends()
    first = page.text
    assert 20 < page.find("#text .t").count() < 2000
    for _ in range(100):
        metrics = httpx.get(f"{server.address}/metrics").text
        if "tvq_rows_running 0.0" in metrics:
            break
        page.page.wait_for_timeout(50)
    assert "tvq_rows_running 0.0" in metrics and page.text == first
    page.set(max_tokens=30)
    page.find("#again").click()
    page.ends()
    second = page.text
    assert second.startswith("Call me") and second != first and page.find("#text .t").count() > 10
    page.find("#undo").click()
    assert page.text == "Call me"


def test_branch(page):
    page.find("#text").press_sequentially("Call me")
    page.set(max_tokens=20, seed=4)
    page.go()
    token = page.find("#text .t").nth(3)
    before = page.page.evaluate("nodes.slice(0, 4).map(n => n.text).join('')")  # typed, and three
    token.click()
    menu = page.find("#menu button")
    expect(menu).to_have_count(10)
    chance = [float(s.split()[-2]) for s in menu.all_inner_texts() if "<" not in s]
    assert chance == sorted(chance, reverse=True)
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("Enter")
    expect(page.find("#menu")).to_be_hidden()
    branched = page.text
    assert branched.startswith(before) and page.find("#text .t").count() == 4
    page.go()
    assert page.text.startswith(branched) and len(page.text) > len(branched)


def test_save_fork_and_reload(page, server):
    page.find("#text").press_sequentially("It was the best")
    page.find("#name").fill("page")
    page.find("#save button").click()
    expect(page.find("#list li")).to_contain_text(["page"])
    page.find("#list li button", has_text="Go on").click()
    expect(page.find("#base-name")).to_have_text("page")
    assert page.text == ""
    page.find("#text").press_sequentially(" of")
    page.set(max_tokens=25, seed=9, temperature=1)
    page.go()
    body = dict(prompt=" of", state="page", max_tokens=25, seed=9, return_token_ids=True)
    answer = httpx.post(f"{server.url}/completions", json=body).json()["choices"][0]
    ids = page.page.evaluate("nodes.flatMap(n => n.ids ?? [])")
    assert ids == answer["token_ids"]
    shown = page.text
    with page.page.expect_download() as download:
        page.find("#list li button", has_text="↓").click()
    assert download.value.suggested_filename == "page.tvq"
    page.page.reload()
    expect(page.find("#base-name")).to_have_text("page")
    assert page.text == shown and page.find("#seed").input_value() == "9"
    page.find("#list li button", has_text="×").click()
    expect(page.find("#list li")).to_have_count(0)


def test_samples_side_by_side(page):
    page.find("#text").press_sequentially("Call me")
    page.set(max_tokens=20, n=3)
    page.go()
    expect(page.find(".sample")).to_have_count(3)
    second = page.find(".sample").nth(1).locator("div").evaluate("e => e.textContent")
    page.find(".sample button").nth(1).click()
    assert page.text == f"Call me{second}" and len(second) > 10
    expect(page.find("#samples")).to_be_hidden()


def test_what_a_model_writes_is_text(page):
    """Whatever it is: here the answer of another server."""
    logprobs = {
        "tokens": [SCRIPT],
        "token_logprobs": [-1.0],
        "top_logprobs": [{SCRIPT: -1.0}],
        "top_token_ids": [[0]],
        "text_offset": [0],
    }
    choice = {"index": 0, "text": SCRIPT, "finish_reason": "stop", "logprobs": logprobs}
    event = {"choices": [{**choice, "token_ids": [0]}], "seed": 1}
    body = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n"
    page.page.route(
        "**/v1/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
    )
    page.find("#text").press_sequentially("x")
    page.go()
    assert page.text == f"x{SCRIPT}"
    page.find("#text .t").click()
    expect(page.find("#menu code")).to_have_text([SCRIPT.replace(" ", "␣")])
    assert page.find("#text script, #text img, #menu script, #menu img").count() == 0
    expect(page.page).to_have_title("bytes")


def test_keys(browser, runs):
    (runs / "keys").write_text("right\n")
    with serving(
        runs / "bytes", "serve-page", "--slots", "4", "--api-key-file", runs / "keys"
    ) as s:
        page = Page(browser, s.address)
        expect(page.find("#key-row")).to_be_visible()
        page.find("#text").press_sequentially("x")
        for key, wrong in (("wrong", True), ("right", False)):
            page.find("#key").fill(key)
            page.find("#key").press("Tab")
            page.go()
            alert = page.find("#error")
            if wrong:
                expect(alert).to_contain_text("the API key is missing or wrong")
                assert page.text == "x"
        expect(alert).to_be_hidden()
        assert len(page.text) > 50
        # The browser itself tells of each answer that is an error.
        assert all("401" in said for said in page.said)
        page.page.close()
