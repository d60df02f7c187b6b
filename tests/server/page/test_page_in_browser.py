"""The page in a browser without a window: needs playwright and a chromium on the machine, and is skipped without.

EDGEMOE_SCREENSHOTS names a folder to keep pictures in.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_server import MARKDOWN, SLOW, PageServer

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
from playwright.sync_api import Browser, Page, expect  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")]

# On a machine that others keep busy all of this takes a while.
PATIENCE = 60_000
expect.set_options(timeout=PATIENCE)

WIDE, NARROW = {"width": 1400, "height": 900}, {"width": 400, "height": 800}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    server = PageServer()
    yield server
    server.close()


class Complaints(list[str]):
    """What a page's console says, and what its policy refused."""


@pytest.fixture
def complaints() -> Complaints:
    return Complaints()


@pytest.fixture
def opened(browser: Browser, server: PageServer, complaints: Complaints) -> Iterator[Any]:
    """A function that opens the page in a browser that knows nothing yet. At the end nothing may have complained."""
    contexts = []

    def open_page(viewport: dict[str, int] = WIDE, url: str = server.url, **options: Any) -> Page:
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        expect(page.get_by_role("heading", name="Talk to ")).not_to_have_text("Talk to the model")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def say(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answered(page: Page) -> None:
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()


def keep_picture(page: Page, name: str) -> None:
    if folder := os.environ.get("EDGEMOE_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def accuse(page: Page) -> list[str]:
    """Serious and critical findings of axe-core."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core finds barriers")
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {node['html'][:200]}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def test_a_conversation_goes_on(opened: Any, server: PageServer) -> None:
    page = opened()
    say(page, "one")
    answered(page)
    say(page, "two")
    expect(page.locator(".answer p", has_text="You said: two")).to_be_visible()
    answered(page)
    assert server.requests[-1]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "You said: one "},
        {"role": "user", "content": "two"},
    ]
    assert server.requests[-1]["model"] == "Qwen3-30B-A3B"
    assert server.requests[-1]["stream_options"] == {"include_usage": True}
    expect(page.get_by_text("3 tokens")).to_have_count(2)


def test_a_conversation_with_the_real_server(opened: Any, url: str) -> None:
    page = opened(url=url)
    say(page, "The old man looked at the sea and")
    answered(page)
    expect(page.locator(".facts")).to_contain_text("64 tokens")
    expect(page.locator(".facts")).to_contain_text("cut at the limit of tokens")
    assert page.locator(".turn.answer > .prose").inner_text()
    expect(page.locator("#hits")).to_contain_text("%")
    expect(page.locator("#experts-text")).to_contain_text("of 128 in memory")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Quality of the experts").select_option("fast")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Done").click()
    say(page, "Go on.")
    answered(page)
    expect(page.locator(".facts")).to_have_count(2)
    expect(page.locator(".failed:visible")).to_have_count(0)


def test_shift_enter_begins_a_line(opened: Any, server: PageServer) -> None:
    page = opened()
    page.get_by_label("Message", exact=True).fill("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    answered(page)
    assert server.requests[0]["messages"][0]["content"] == "one\ntwo"


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_an_answer_is_stopped(opened: Any, server: PageServer, how: str) -> None:
    page = opened()
    say(page, "endless")
    expect(page.get_by_text("1 2 3")).to_be_visible()
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    answered(page)
    expect(page.locator(".facts")).to_contain_text("stopped")
    for _ in range(100):
        if server.closed:
            break
        page.wait_for_timeout(20)
    assert server.closed == 1


def test_a_turn_is_edited_and_sent_again(opened: Any, server: PageServer) -> None:
    page = opened()
    for text in ("one", "two"):
        say(page, text)
        answered(page)
    page.get_by_role("button", name="Edit and send again").first.click()
    page.get_by_role("textbox", name="Your message").fill("uno")
    page.keyboard.press("Enter")
    expect(page.locator(".answer p", has_text="You said: uno")).to_be_visible()
    answered(page)
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "uno"}]
    expect(page.locator(".turn")).to_have_count(2)
    page.get_by_role("button", name="Edit and send again").click()
    page.keyboard.press("Escape")
    expect(page.locator(".said")).to_have_text("uno")


def test_editing_while_the_model_answers_stops_that_answer(opened: Any, server: PageServer) -> None:
    page = opened()
    say(page, "endless")
    expect(page.get_by_text("1 2 3")).to_be_visible()
    page.get_by_role("button", name="Edit and send again").click()
    page.get_by_role("textbox", name="Your message").fill("better")
    page.keyboard.press("Enter")
    answered(page)
    expect(page.locator(".turn.answer")).to_contain_text("You said: better")
    expect(page.locator(".turn")).to_have_count(2)


def test_an_answer_is_made_again(opened: Any, server: PageServer) -> None:
    page = opened()
    say(page, "one")
    answered(page)
    page.get_by_role("button", name="Regenerate").click()
    answered(page)
    page.wait_for_function("() => document.querySelectorAll('.turn').length === 2")
    assert [request["messages"] for request in server.requests] == [[{"role": "user", "content": "one"}]] * 2


def test_thoughts_are_folded(opened: Any, server: PageServer) -> None:
    page = opened()
    say(page, "think about it")
    answered(page)
    thoughts = page.get_by_text("I weigh it.")
    expect(thoughts).to_be_hidden()
    page.locator(".thoughts summary:visible").click()
    expect(thoughts).to_be_visible()
    expect(page.locator(".answer p", has_text="It is so.")).to_be_visible()
    say(page, "more")
    answered(page)
    assert server.requests[-1]["messages"][1]["reasoning_content"] == "The user wants to know. I weigh it. "


def test_calls_are_shown(opened: Any) -> None:
    page = opened()
    say(page, "call a tool")
    answered(page)
    expect(page.locator(".call")).to_contain_text("weather")
    expect(page.locator(".call pre")).to_have_text('{"city": "<b>Oslo</b>"}')
    expect(page.locator(".facts")).to_contain_text("asks for a tool")


@pytest.mark.parametrize(
    "text, message",
    [
        ("fail", "layer 3, expert 7: the read failed"),
        ("break", "The server broke off."),
    ],
)
def test_failures_are_told(opened: Any, server: PageServer, text: str, message: str) -> None:
    page = opened()
    say(page, text)
    expect(page.locator(".failed")).to_contain_text(message)
    expect(page.locator(".answer .prose p")).to_contain_text("You said: ")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    assert len(server.requests) == 2


def test_refusals_are_told(opened: Any, complaints: Complaints) -> None:
    page = opened()
    say(page, "refuse")
    expect(page.locator(".failed")).to_contain_text("temperature = 9 is above 5")
    assert len(complaints) == 1 and "400" in complaints.pop()  # the browser's own line about the status


def test_several_conversations_are_kept(opened: Any, server: PageServer) -> None:
    page = opened()
    say(page, "about whales")
    answered(page)
    page.get_by_role("button", name="New conversation").click()
    say(page, "about bees")
    answered(page)
    assert len(server.requests[-1]["messages"]) == 1
    page.reload()
    names = page.locator(".chats .open")
    expect(names).to_have_text(["about bees", "about whales"])
    names.nth(1).click()
    expect(page.locator(".answer p", has_text="You said: about whales")).to_be_visible()
    page.get_by_role("button", name="Rename “about whales”").click()
    page.keyboard.type("Whales")
    page.keyboard.press("Enter")
    expect(names).to_have_text(["about bees", "Whales"])
    page.get_by_role("button", name="Delete “Whales”").click()
    expect(names).to_have_text(["about bees"])
    page.get_by_role("button", name="Undo").click()
    expect(names).to_have_text(["about bees", "Whales"])
    page.get_by_role("button", name="Delete “Whales”").click()
    page.reload()
    expect(names).to_have_text(["about bees"])


def test_an_answer_goes_on_while_another_conversation_is_open(opened: Any, server: PageServer) -> None:
    page = opened()
    say(page, "endless")
    expect(page.get_by_text("1 2 3")).to_be_visible()
    page.get_by_role("button", name="New conversation").click()
    say(page, "hello")
    expect(page.locator(".answer p", has_text="You said: hello")).to_be_visible()
    page.locator(".chats .open", has_text="endless").click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.get_by_role("button", name="Delete “endless”").click()
    page.reload()
    expect(page.locator(".chats .open")).to_have_text(["hello"])


def test_settings_are_sent(opened: Any, server: PageServer) -> None:
    page = opened()
    page.get_by_role("button", name="Settings").click()
    for name, value in {"Temperature": "0.5", "Top-k": "7", "Top-p": "0.9", "Min-p": "0.1", "Seed": "3"}.items():
        page.get_by_label(name).fill(value)
    page.get_by_label("Tokens at most").fill("50")
    page.get_by_label("Quality of the experts").select_option("balanced")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Form").select_option("JSON of a schema")
    page.get_by_label("JSON schema").fill('{"type": "object"')
    expect(page.get_by_role("alert")).to_contain_text("No JSON")
    page.get_by_label("JSON schema").fill('{"type": "object"}')
    page.get_by_role("button", name="Done").click()
    page.reload()
    say(page, "one")
    answered(page)
    request = server.requests[0]
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    numbers = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "seed": 3, "max_tokens": 50}
    assert {name: request[name] for name in numbers} == numbers
    assert request["quality"] == "balanced"
    assert request["response_format"]["json_schema"]["schema"] == {"type": "object"}
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Reset").click()
    page.keyboard.press("Escape")
    say(page, "two")
    expect(page.locator(".answer p", has_text="You said: two")).to_be_visible()
    assert set(server.requests[1]) == {"model", "messages", "stream", "stream_options"}


def test_a_key_is_asked_for(browser: Browser, server: PageServer) -> None:
    server.key = "secret"
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Talk to Qwen3-30B-A3B")).to_be_visible()
    say(page, "one")
    answered(page)
    page.reload()
    expect(page.get_by_text("Talk to Qwen3-30B-A3B")).to_be_visible()
    context.close()


def test_markdown_becomes_nodes(opened: Any) -> None:
    page = opened()
    say(page, "markdown")
    answered(page)
    prose = page.locator(".turn.answer > .prose")
    shape = prose.evaluate("node => [...node.querySelectorAll('*')].map(n => n.tagName.toLowerCase()).join(' ')")
    assert shape == (
        "h3 p em strong a code ol li ul li li li div table thead tr th th tbody tr td td tr td td "
        "blockquote p div div span button pre code"
    )
    expect(prose.locator("pre code")).to_have_text(MARKDOWN.split("```")[1].removeprefix("python\n").rstrip("\n"))
    link = prose.locator("a")
    assert link.get_attribute("href") == "https://example.org/whales"
    assert link.get_attribute("rel") == "noopener noreferrer"


def test_code_is_copied(opened: Any) -> None:
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    say(page, "markdown")
    answered(page)
    page.get_by_role("button", name="Copy the code").click()
    expect(page.get_by_role("button", name="Copy the code")).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == MARKDOWN.split("```")[1].removeprefix("python\n").rstrip("\n")
    page.get_by_role("button", name="Copy the answer").click()
    page.wait_for_function("() => navigator.clipboard.readText().then(text => text.startsWith('# Whales'))")


def test_a_hostile_answer_does_nothing(opened: Any, server: PageServer) -> None:
    page = opened()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    say(page, "hostile")
    answered(page)
    prose = page.locator(".turn.answer > .prose")
    assert page.evaluate("window.hacked") is None
    assert prose.locator("script, img, svg, iframe, style, form, input, [onclick], [onerror], [style]").count() == 0
    links = prose.locator("a").evaluate_all("nodes => nodes.map(node => node.href)")
    assert all(link.startswith("https://example.org/") for link in links)
    assert all(url.startswith(server.url) for url in asked)
    expect(prose).to_contain_text("<script>window.hacked = 1</script>")
    expect(page.get_by_label("Message", exact=True)).to_be_visible()
    keep_picture(page, "hostile")


def test_no_text_is_slow_to_draw(opened: Any) -> None:
    page = opened()
    for number in range(len(SLOW)):
        say(page, f"slow {number}")
        answered(page)
        page.get_by_role("button", name="New conversation").click()


def test_a_script_in_the_page_is_refused(opened: Any, complaints: Complaints) -> None:
    """The policy itself works: what would be refused if the renderer failed."""
    page = opened()
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            try { script.textContent = "window.hacked = 1"; } catch {}
            document.body.append(script);
            try { document.body.innerHTML += "<img src=x onerror='window.hacked = 2'>"; } catch {}
        }"""
    )
    assert page.evaluate("window.hacked") is None
    assert complaints
    complaints.clear()


def test_what_the_engine_does_is_shown(opened: Any, server: PageServer) -> None:
    page = opened()
    expect(page.locator("#now")).to_have_text("idle")
    expect(page.locator("#memory-text")).to_have_text("3.1 GB of 4.0 GB")
    expect(page.locator("#experts-text")).to_contain_text("of 6,144 in memory (25 %)")
    server.pause = 0.02
    say(page, "endless")
    expect(page.locator("#now")).to_have_text("1 answer under way")
    expect(page.locator("#hits")).to_have_text("75%")
    expect(page.locator("#read")).to_have_text("24.5MB")
    page.wait_for_function("() => parseFloat(document.getElementById('speed').textContent) > 5")
    page.wait_for_function(
        "() => parseInt(/, (\\d+) read since/.exec(document.getElementById('experts-text').textContent)?.[1]) > 50"
    )
    cells = page.locator("#cells").evaluate(
        """canvas => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return new Set(new Uint32Array(data.buffer)).size;
        }"""
    )
    assert cells >= 4  # nothing, on disk, in memory, just read
    page.get_by_text("By layer, as a table").click()
    expect(page.locator("#layers-rows tr")).to_have_count(48)
    page.keyboard.press("Escape")
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.press("Escape")
    expect(page.locator("#now")).to_have_text("idle")


def test_the_engine_is_not_asked_while_nobody_looks(opened: Any) -> None:
    page = opened()
    with page.expect_request("**/engine"):
        pass
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.evaluate(
        """() => {
            Object.defineProperty(document, "visibilityState", {value: "hidden"});
            document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    page.wait_for_timeout(100)
    asked.clear()
    page.wait_for_timeout(1200)
    assert asked == []


def test_the_keyboard_is_enough(opened: Any) -> None:
    page = opened()
    skip = page.get_by_text("Skip to the message field")
    for _ in range(30):
        page.keyboard.press("Shift+Tab")
        if skip.evaluate("node => node === document.activeElement"):
            break
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Enter")
    answered(page)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                """() => {
                    const node = document.activeElement;
                    const outline = getComputedStyle(node);
                    if (node !== document.body && outline.outlineStyle === "none" && !node.closest(".box"))
                        return "no outline: " + node.outerHTML;
                    return node.getAttribute("aria-label") || node.textContent.trim();
                }"""
            )
        )
    wanted = {"Settings", "New conversation", "one", "Rename “one”", "Delete “one”", "Edit and send again"}
    assert wanted | {"Copy your message", "Copy the answer", "Regenerate", "Message"} - {"Message"} <= reached
    assert not [name for name in reached if name.startswith("no outline")]


def test_drawers_open_where_the_window_is_narrow(opened: Any) -> None:
    page = opened(NARROW)
    expect(page.get_by_role("button", name="New conversation")).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    expect(page.get_by_role("button", name="New conversation")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="New conversation")).to_be_hidden()
    expect(page.get_by_role("button", name="Conversations")).to_be_focused()
    page.get_by_role("button", name="Engine").click()
    expect(page.locator("#experts-text")).to_be_in_viewport()
    page.keyboard.press("Escape")
    expect(page.locator("#experts-text")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_no_barriers_and_nothing_beyond_the_edge(
    opened: Any, server: PageServer, viewport: dict[str, int], scheme: str
) -> None:
    page = opened(viewport, color_scheme=scheme, reduced_motion="reduce")
    name = f"{viewport['width']}-{scheme}"
    found = accuse(page)
    keep_picture(page, f"{name}-empty")
    for text in ("markdown", "think about it", "call a tool"):
        say(page, text)
        answered(page)
    page.locator(".thoughts summary:visible").click()
    found += accuse(page)
    keep_picture(page, f"{name}-answers")
    page.locator("#scroll").evaluate("node => node.scrollTo(0, 0)")
    keep_picture(page, f"{name}-begin")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    if viewport is NARROW:
        page.get_by_role("button", name="Conversations").click()
        page.wait_for_timeout(300)
        found += accuse(page)
        keep_picture(page, f"{name}-chats")
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Engine").click()
        page.wait_for_timeout(300)
        found += accuse(page)
        keep_picture(page, f"{name}-engine")
        page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Form").select_option("JSON of a schema")
    found += accuse(page)
    keep_picture(page, f"{name}-settings")
    page.get_by_label("Form").select_option("text")
    page.keyboard.press("Escape")
    if "EDGEMOE_SCREENSHOTS" in os.environ:
        server.pause = 0.05
        say(page, "endless")
        page.wait_for_timeout(1500)
        keep_picture(page, f"{name}-busy")
        page.get_by_role("button", name="Stop").click()
    assert found == []
