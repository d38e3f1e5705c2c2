"""The chat page in a browser, over a server that answers as each test wants."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from urllib.error import HTTPError

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect

from llama_onnx.runtime.serving.pages import POLICY, read_page
from tests.support.chat_server import ABOUT, Script, running, stub_app

SLOW = "\n\n".join(f"This is paragraph {i} of an answer that takes a while." for i in range(40))

Open = Callable[..., Script]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Script]]:
    script = Script()
    with running(stub_app(script)) as url:
        yield url, script


@pytest.fixture
def opened(served: tuple[str, Script], page: Page) -> Open:
    """Opens the page over a server with a script of these values."""
    url, script = served

    def start(**values: Any) -> Script:
        fresh = Script(**values)
        for name, value in vars(fresh).items():
            setattr(script, name, value)
        page.goto(url)
        expect(page.locator("#title")).to_have_text(
            script.about["name"] if not script.key else "llama-onnx"
        )
        return script

    return start


def ask(page: Page, text: str, *, wait: bool = True) -> None:
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")
    if wait:
        done(page)


def done(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(page.locator(".is-writing")).to_have_count(0)


def answer(page: Page, index: int = -1) -> Locator:
    return page.locator(".answer").nth(index)


def turns(script: Script, index: int = -1) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in script.requests[index]["messages"]]


# ---- a conversation ------------------------------------------------------------------------------


def test_a_conversation(page: Page, opened: Open) -> None:
    script = opened(text="Hello **you**.")
    expect(page.locator("#welcome")).to_be_visible()
    ask(page, "  Hello?\nSecond line  ")
    expect(page.locator("#welcome")).to_be_hidden()
    expect(page.locator(".question .body")).to_have_text("Hello?\nSecond line")
    expect(answer(page).locator(".body strong")).to_have_text("you")
    script.text = "And again."
    ask(page, "More")
    expect(answer(page).locator(".body")).to_have_text("And again.")
    sent = script.requests[-1]
    assert turns(script) == [
        ("user", "Hello?\nSecond line"), ("assistant", "Hello **you**."), ("user", "More")
    ]  # fmt: skip
    assert sent["stream"] is True and sent["stream_options"] == {"include_usage": True}
    assert sent["model"] == "Stub-1B-int4"
    assert not {"temperature", "max_completion_tokens"} & sent.keys()


def test_the_rate_is_that_of_the_tokens_after_the_first(page: Page, opened: Open) -> None:
    opened(text="x" * 40, pieces=4, pause=0.4)
    ask(page, "Go")
    tokens, rate, first = answer(page).locator(".stats").inner_text().split(" · ")
    assert tokens == "10 tokens"
    # Nine pauses of 0.4 seconds are 2.5 tokens a second; a busy machine shifts the ends a little.
    assert 1 < float(rate.removesuffix(" tokens/s")) < 4
    assert first.startswith("first after")


def test_tokens_that_come_in_a_heap_have_the_rate_of_the_whole(page: Page, opened: Open) -> None:
    opened(text="x" * 4000, pieces=4)
    page.evaluate(HEAP)
    ask(page, "Go")
    tokens, rate, whole = answer(page).locator(".stats").inner_text().split(" · ")
    seconds = float(whole.removeprefix("in ").removesuffix(" s"))
    expected = 1000 / seconds
    assert tokens == "1,000 tokens"
    found = float(rate.removesuffix(" tokens/s with reading").replace(",", ""))
    assert found == pytest.approx(expected, rel=0.01 / seconds)


HEAP = """() => {
  const real = window.fetch;
  window.fetch = async (...a) => {
    const got = await real(...a);
    await new Promise((resume) => setTimeout(resume, 500));
    return new Response(await got.blob(), got);
  };
}"""
"""Makes `fetch` deliver whole bodies only, as a proxy that buffers does."""


def test_a_text_comes_before_the_answer_is_complete(page: Page, opened: Open) -> None:
    opened(text=SLOW, pause=0.05)
    ask(page, "Go", wait=False)
    expect(answer(page).locator(".body")).to_contain_text("paragraph 1")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    assert answer(page).get_attribute("aria-busy") == "true"
    assert "paragraph 39" not in answer(page).inner_text()


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_keeps_what_came_and_frees_the_server(page: Page, opened: Open, how: str) -> None:
    script = opened(text=SLOW, pause=0.05)
    ask(page, "Go", wait=False)
    expect(answer(page).locator(".body")).to_contain_text("paragraph 0")
    if how == "button":
        page.get_by_role("button", name="Stop", exact=True).click()
    else:
        page.keyboard.press("Escape")
    done(page)
    expect(answer(page).locator(".notice")).to_have_text("You stopped this answer.")
    expect(answer(page).locator(".stats")).to_contain_text("about")
    kept = answer(page).locator(".body").inner_text()
    page.wait_for_timeout(300)
    assert answer(page).locator(".body").inner_text() == kept
    assert script.left == 1
    script.text, script.pause = "Fine.", 0.0
    ask(page, "And now?")
    assert turns(script)[1][0] == "assistant" and turns(script)[1][1].startswith("This is")


def test_edit_a_message_and_send_it_again(page: Page, opened: Open) -> None:
    script = opened(text="First.")
    ask(page, "One")
    ask(page, "Two")
    page.get_by_role("button", name="Edit this message").first.click()
    field = page.get_by_label("Edit your message")
    expect(field).to_be_focused()
    assert field.input_value() == "One"
    field.press("Escape")
    expect(page.locator(".editing")).to_have_count(0)
    expect(page.get_by_role("button", name="Edit this message").first).to_be_focused()
    page.keyboard.press("Enter")
    field.fill("Uno")
    script.text = "Primo."
    field.press("Enter")
    done(page)
    expect(page.locator(".question .body")).to_have_text(["Uno"])
    expect(page.locator(".answer .body")).to_have_text(["Primo."])
    assert turns(script) == [("user", "Uno")]


def test_retry_an_answer(page: Page, opened: Open) -> None:
    script = opened(text="First.")
    ask(page, "One")
    ask(page, "Two")
    script.text = "Another."
    page.get_by_role("button", name="Retry this answer").first.click()
    done(page)
    expect(page.locator("article")).to_have_count(2)
    expect(answer(page).locator(".body")).to_have_text("Another.")
    assert turns(script) == [("user", "One")]


def test_an_edit_while_an_answer_is_written_takes_its_place(page: Page, opened: Open) -> None:
    script = opened(text=SLOW, pause=0.05)
    ask(page, "One", wait=False)
    expect(answer(page).locator(".body")).to_contain_text("paragraph 0")
    page.get_by_role("button", name="Edit this message").click()
    script.text, script.pause = "Short.", 0.0
    page.get_by_label("Edit your message").fill("Two")
    page.get_by_role("button", name="Send", exact=True).click()
    done(page)
    page.wait_for_timeout(200)
    expect(page.locator(".answer .body")).to_have_text(["Short."])
    assert script.left == 1


def test_copy(page: Page, context: BrowserContext, opened: Open) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    text = "Some *Markdown*:\n\n```js\nlet a = 1;\n\nlet b = 2;\n```"
    opened(text=text)
    ask(page, "A question")
    read = "navigator.clipboard.readText()"
    for label, copied in (
        ("Copy this answer", text),
        ("Copy code", "let a = 1;\n\nlet b = 2;"),
        ("Copy this message", "A question"),
    ):
        page.get_by_role("button", name=label).click()
        expect(page.get_by_role("button", name=label)).to_contain_text("Copied")
        assert page.evaluate(read) == copied


def test_copy_without_the_clipboard_of_secure_pages(
    page: Page, context: BrowserContext, opened: Open
) -> None:
    context.grant_permissions(["clipboard-read"])
    page.add_init_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    opened(text="The text.")
    ask(page, "Go")
    button = page.get_by_role("button", name="Copy this answer")
    button.click()
    expect(button).to_contain_text("Copied")
    expect(button).to_be_focused()
    page.locator("#prompt").focus()
    page.keyboard.press("ControlOrMeta+v")
    expect(page.locator("#prompt")).to_have_value("The text.")


def test_what_is_complete_keeps_its_elements_while_the_rest_is_written(
    page: Page, opened: Open
) -> None:
    opened(text=f"```js\nlet a = 1;\n```\n\n{SLOW}", pause=0.02)
    ask(page, "Go", wait=False)
    expect(answer(page).locator(".body")).to_contain_text("paragraph 0")
    button = page.get_by_role("button", name="Copy code")
    button.focus()
    expect(answer(page).locator(".body")).to_contain_text("paragraph 3")
    expect(button).to_be_focused()
    assert "paragraph 39" not in answer(page).inner_text()


def test_a_new_chat_forgets_and_a_reload_does_not(page: Page, opened: Open) -> None:
    script = opened(text="Kept.")
    ask(page, "One")
    page.reload()
    expect(page.locator("article .body")).to_have_text(["One", "Kept."])
    ask(page, "Two")
    assert [content for _, content in turns(script)] == ["One", "Kept.", "Two"]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    expect(page.locator("#prompt")).to_be_focused()
    ask(page, "Three")
    assert turns(script) == [("user", "Three")]


def test_settings_go_into_the_request_and_stay(page: Page, opened: Open) -> None:
    script = opened(models=["Stub-1B-int4", "pirate"])
    page.locator("#settings summary").click()
    page.get_by_label("Model").select_option("pirate")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Most tokens of an answer").fill("0")
    ask(page, "Go")
    sent = script.requests[-1]
    assert turns(script) == [("system", "Be brief."), ("user", "Go")]
    assert sent["temperature"] == 0.7 and sent["model"] == "pirate"
    # A value that is not used says so.
    assert "max_completion_tokens" not in sent
    expect(page.locator("#max-tokens-help")).to_contain_text("Not used")
    page.get_by_label("Most tokens of an answer").fill("12")
    page.reload()
    page.locator("#settings summary").click()
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    ask(page, "Go")
    assert script.requests[-1]["max_completion_tokens"] == 12


# ---- a stranger's Markdown -----------------------------------------------------------------------

HOSTILE = """\
<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2">
<svg onload="window.hacked = 3"></svg> <style>body { display: none }</style>

<iframe src="https://example.org/frame"></iframe>

[run](javascript:window.hacked=4) [data](data:text/html,<script>window.hacked=5</script>)
[spaced](java&#x0A;script:window.hacked=6) <javascript:window.hacked=7>
[good](https://example.org/page "title") [here](/metrics) <https://example.org/auto>

![a foreign image](https://example.org/pixel.png) ![local](/metrics) ![x](data:image/png;base64,aa)

```html" onmouseover="window.hacked=8
<script>window.hacked = 9</script>
```

| <b onclick=alert(1)>cell</b> | a<br>b |
| --- | --- |
| <form action=https://example.org><input name=q></form> | `<x>` |

<details id="about" open><summary>fake</summary></details> <a id="prompt" class="notice">x</a>
"""


def test_hostile_markdown_is_only_text(page: Page, opened: Open) -> None:
    foreign: list[str] = []
    page.on("request", lambda r: foreign.append(r.url) if "127.0.0.1" not in r.url else None)
    local: list[str] = []
    page.on("request", lambda r: local.append(r.url) if r.url.endswith("/metrics") else None)
    opened(text=HOSTILE, pieces=7)
    ask(page, "Go")
    body = answer(page).locator(".body")
    expect(body).to_contain_text("<script>window.hacked = 1</script>")
    expect(body).to_contain_text("a foreign image")
    made = body.evaluate(
        """body => ({
          names: [...new Set([...body.querySelectorAll("*")].map(e => e.localName))],
          handlers: [...body.querySelectorAll("*")].flatMap(e => [...e.attributes])
            .filter(a => /^(on|style|id|name|srcdoc)/.test(a.name)).map(a => a.name),
          links: [...body.querySelectorAll("a")]
            .map(a => [a.getAttribute("href"), a.rel, a.target]),
        })"""
    )
    bad = {"script", "style", "iframe", "img", "form", "input", "object", "embed", "details"}
    assert not bad & set(made["names"])
    assert made["handlers"] == []
    assert {href for href, _, _ in made["links"]} == {
        "https://example.org/page", "https://example.org/auto", "https://example.org/pixel.png"
    }  # fmt: skip
    assert {tuple(rest) for _, *rest in made["links"]} == {
        ("noopener noreferrer nofollow", "_blank")
    }
    for element in body.locator("*:not(pre)").all():
        element.dispatch_event("mouseover")
    assert page.evaluate("window.hacked") is None
    assert foreign == [] and local == []
    expect(body.locator("td").nth(1)).to_have_text("<x>")
    assert body.locator("th").nth(1).inner_html() == "a<br>b"
    expect(page.locator("#prompt")).to_be_editable()


RAW = (
    '<p class="notice" style="color:red" onclick="x()">a<script>x()</script></p>'
    '<img src="https://example.org/x.png" onerror="x()"><a href=" javascript:x()">b</a>'
    '<math><mtext><table><mglyph><style><img src=x onerror="x()"></style></mglyph></table></mtext>'
    '</math><form id="f"><input name="attributes"></form><table><td class="code">c</td></table>'
    '<a href="https://example.org" target="_self" id="prompt" data-x="1">d</a>'
)


def test_the_second_layer_alone_lets_no_html_through(
    served: tuple[str, Script], context: BrowserContext
) -> None:
    """What DOMPurify would have to hold if the first layer let HTML pass."""
    page = context.new_page()  # the fixture's would count what the policy reports, which holds too
    page.goto(served[0])
    made = page.evaluate(
        """async html => {
          const {clean} = await import("/page/markdown.js");
          const box = document.createElement("div");
          box.append(clean(html));
          return [[...box.querySelectorAll("*")].flatMap(e =>
            [...e.attributes].map(a => `${e.localName} ${a.name}=${a.value}`)), box.textContent,
            [...new Set([...box.querySelectorAll("*")].map(e => e.localName))]];
        }""",
        RAW,
    )
    attributes, text, names = made
    assert set(names) <= {"p", "a", "div", "table", "tbody", "tr", "td"}
    assert text == "abcd"
    assert set(attributes) == {
        "a href=https://example.org",
        "a rel=noopener noreferrer nofollow",
        "a target=_blank",
        "a title=https://example.org/",
        "div class=table",
        "div tabindex=0",
        "div role=region",
        "div aria-label=Table",
    }


BOMBS = {
    "quotes": "> " * 5000 + "x",
    "lists": "\n".join(f"{'  ' * i}- x" for i in range(300)),
    "markers": "- " * 5000 + "x",
    "brackets": "[" * 20000,
    "strokes": "~~a~" * 5000,
    "html": "<a " * 10000,
    "emails": "a." * 10000 + "@",
    "tables": "|" * 10000 + "\n" + "|-" * 10000,
    "long": "word " * 50000,
}
"""Texts for which the parser takes seconds, up to half a minute, or runs out of stack."""


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_markdown_made_to_be_slow_does_not_stop_the_page(
    bomb: str, page: Page, opened: Open
) -> None:
    opened(text=bomb, pieces=len(bomb))
    ask(page, "Go")
    expect(answer(page).locator(".stats")).to_contain_text("1 token")
    shown = answer(page).locator(".body").evaluate("body => body.textContent")
    assert shown.count("a") == bomb.count("a") and shown.count("x") == bomb.count("x")
    before = processor_seconds(page)
    script = "import('/page/markdown.js').then(({Rendering}) =>"
    script += " new Rendering(document.createElement('div')).update(text))"
    page.evaluate(f"text => {script}.then(() => null)", bomb)
    assert processor_seconds(page) - before < 5


def processor_seconds(page: Page) -> float:
    """What the page's thread has computed for so far, however busy the machine is."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    metrics = session.send("Performance.getMetrics")["metrics"]
    session.detach()
    return float(next(one["value"] for one in metrics if one["name"] == "TaskDuration"))


# ---- errors --------------------------------------------------------------------------------------


ERRORS = {
    "busy": (
        {"status": 429, "error": {"message": "too many requests are waiting: try again later."},
         "headers": {"Retry-After": "7"}},
        "Too many requests are waiting. Try again in 7 seconds.",
    ),
    "context": (
        {"status": 400, "error": {
            "message": "the prompt has 9,001 tokens, more than the context of 8,192.",
            "code": "context_length_exceeded"}},
        "This conversation no longer fits the model's context. The prompt has 9,001 tokens, more "
        "than the context of 8,192. Start a new chat, or edit an earlier message.",
    ),
    "body": (
        {"status": 413, "error": "the request has more bytes than the server reads."},
        "The request has more bytes than the server reads. Shorten it.",
    ),
    "sentence": ({"status": 400, "error": {"message": "no model 'x'."}}, "No model 'x'."),
    "no sentence": (
        {"status": 502, "error": None}, "The server failed (status 502): see its log."
    ),
    "gone in the middle": (
        {"text": "Half of it, and more", "break_after": 2, "pause": 0.2},
        "The connection to the server broke in the middle of the answer. What arrived is kept.",
    ),
    "error in the middle": (
        {"text": "Half of it, and more", "break_after": 2,
         "error": {"message": "the model's logits are not finite."}},
        "The model's logits are not finite.",
    ),
    "length": (
        {"text": "Cut", "finish": "length"},
        "The answer was cut off: it reached its limit of tokens.",
    ),
    "nothing": ({"text": ""}, "The model ended its answer without a word."),
}  # fmt: skip


@pytest.mark.parametrize(("values", "sentence"), ERRORS.values(), ids=ERRORS)
def test_an_error_is_a_sentence(
    values: dict[str, Any], sentence: str, page: Page, opened: Open
) -> None:
    script = opened(**values)
    ask(page, "One")
    expect(answer(page).locator(".notice")).to_have_text(sentence)
    expect(page.locator("#speech")).to_contain_text(sentence)
    kept = script.text[: 2 * script.pieces] if script.break_after else script.text
    if script.status == 200:
        expect(answer(page).locator(".body")).to_have_text(kept)
    # What follows works again, and has each question once.
    fresh = Script(requests=script.requests)
    for name, value in vars(fresh).items():
        setattr(script, name, value)
    ask(page, "Two")
    expect(answer(page).locator(".body")).to_have_text("An answer.")
    said = kept if script.requests and "status" not in values else ""
    expected = [("user", "One"), ("assistant", said), ("user", "Two")]
    assert turns(script) == (expected if said else [("user", "One\n\nTwo")])


def test_a_server_that_is_gone(page: Page) -> None:
    script = Script()
    with running(stub_app(script)) as url:
        page.goto(url)
        expect(page.locator("#title")).to_have_text(script.about["name"])
    ask(page, "One")
    expect(answer(page).locator(".notice")).to_contain_text("The server cannot be reached.")


def test_the_key_is_asked_for_and_stays_in_the_tab(
    page: Page, context: BrowserContext, opened: Open
) -> None:
    script = opened(key="open sesame")
    dialog = page.locator("#key-dialog")
    expect(dialog).to_be_visible()
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-text")).to_contain_text("did not accept")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.locator("#about-panel")).to_contain_text("did not accept the key")
    ask(page, "Hello", wait=False)
    page.get_by_label("API key").fill("open sesame")
    page.get_by_role("button", name="Use this key").click()
    done(page)
    expect(answer(page).locator(".body")).to_have_text("An answer.")
    page.reload()
    expect(page.locator("#title")).to_have_text(script.about["name"])
    expect(dialog).to_be_hidden()
    assert "sesame" in page.evaluate("JSON.stringify(sessionStorage)")
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
    other = context.new_page()
    other.goto(page.url)
    expect(other.locator("#key-dialog")).to_be_visible()


def test_without_the_key_an_answer_says_so(page: Page, opened: Open) -> None:
    opened(key="open sesame")
    expect(page.locator("#key-dialog")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    ask(page, "Hello", wait=False)
    expect(page.locator("#key-dialog")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    done(page)
    expect(answer(page).locator(".notice")).to_contain_text("answers only with its key")


# ---- keyboard, screen reader, colors -------------------------------------------------------------


def tab_to(page: Page, name: str, *, back: bool = False) -> None:
    for _ in range(60):
        page.keyboard.press("Shift+Tab" if back else "Tab")
        focused = page.evaluate(
            "(e => e.ariaLabel ?? e.labels?.[0]?.textContent ?? e.textContent)"
            "(document.activeElement)"
        )
        if name in focused:
            return
    raise AssertionError(f"Tab does not reach {name}")


def test_everything_by_keyboard_alone(page: Page, opened: Open) -> None:
    script = opened(text="One.\n\n```py\nx = 1\n```", pieces=3)
    tab_to(page, "Skip to the message field", back=True)
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    page.keyboard.press("Enter")
    done(page)
    assert turns(script) == [("user", "a\nb")]
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_label("Edit your message")).to_be_focused()
    page.keyboard.type("c")
    page.keyboard.press("Enter")
    done(page)
    assert turns(script) == [("user", "a\nbc")]
    page.locator("#prompt").focus()
    for name in ("Retry this answer", "Copy this answer", "Code in py", "Copy code"):
        tab_to(page, name, back=True)
    tab_to(page, "Theme", back=True)
    page.keyboard.press("Space")
    expect(page.locator("#theme")).to_have_text("Theme: light")
    tab_to(page, "Settings")
    page.keyboard.press("Enter")
    tab_to(page, "System prompt")
    page.keyboard.type("Short.")
    page.keyboard.press("Escape")
    expect(page.locator("#settings summary")).to_be_focused()
    expect(page.locator("#system")).to_be_hidden()
    tab_to(page, "New chat", back=True)
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    expect(page.locator("article")).to_have_count(0)


def test_a_screen_reader_hears_paragraphs_once(page: Page, opened: Open) -> None:
    page.add_init_script(
        """window.heard = [];
        document.addEventListener("DOMContentLoaded", () => new MutationObserver(list => {
          for (const {addedNodes} of list)
            for (const node of addedNodes) window.heard.push(node.textContent);
        }).observe(document.getElementById("speech"), {childList: true}));"""
    )
    opened(
        text="One *word*,\nthen [more](https://example.org).\n\n```js\na\n\nb\n```\n\n- Last.",
        pieces=2,
        pause=0.02,
    )
    ask(page, "Go")
    assert page.evaluate("heard") == [
        "The model is answering.",
        "One word,\nthen more.",
        "Code block.",
        "Last.",
        "The answer is complete.",
    ]
    assert page.locator("#messages [aria-live], #conversation[aria-live]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colors_are_those_of_the_system_or_the_users(
    scheme: Any, page: Page, opened: Open
) -> None:
    other = "dark" if scheme == "light" else "light"
    page.emulate_media(color_scheme=scheme)
    opened()

    def brightness() -> int:
        color = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return int(color.removeprefix("rgb(").split(",")[0])

    dark = {"light": False, "dark": True}
    assert (brightness() < 64) == dark[scheme]
    theme = page.locator("#theme")
    while theme.inner_text() != f"Theme: {other}":
        theme.click()
    assert (brightness() < 64) == dark[other]
    page.reload()
    assert (brightness() < 64) == dark[other]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_axe_finds_nothing(narrow: bool, scheme: Any, axe: str, page: Page, opened: Open) -> None:
    if narrow:
        page.set_viewport_size({"width": 360, "height": 640})
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    about = {**ABOUT, "verified": {"state": "failed", "sentence": "x.onnx changed."}}
    script = opened(text=RICH, about=about, models=["a", "b"])
    found = {"empty": violations(page, axe)}
    ask(page, "One")
    found["answered"] = violations(page, axe)
    page.locator("#settings summary").click()
    page.get_by_label("Temperature").fill("9")
    page.get_by_label("Temperature").press("Tab")
    found["settings"] = violations(page, axe)
    page.locator("#about summary").click()
    found["about"] = violations(page, axe)
    page.locator("h1").click()
    script.status, script.error = 429, {"message": "busy."}
    ask(page, "Two")
    page.get_by_role("button", name="Edit this message").first.click()
    found["error and edit"] = violations(page, axe)
    script.key = "key"
    ask(page, "Three", wait=False)
    expect(page.locator("#key-dialog")).to_be_visible()
    found["key"] = violations(page, axe)
    assert found == {state: [] for state in found}


RICH = """\
# Title

Text with `code`, a [link](https://example.org) and ![image](https://example.org/x).

> quoted

1. one
   - [x] two

```python
print(1)
```

| a | b |
| --- | ---: |
| 1 | 2 |

---

End.
"""


def violations(page: Page, axe: str) -> list[str]:
    page.evaluate(axe)
    rules = page.evaluate("axe.run().then(result => result.violations)")
    return [
        f"{r['id']}: {n['html'][:120]} {n['failureSummary']}" for r in rules for n in r["nodes"]
    ]


@pytest.mark.parametrize("width", [320, 390, 820])
def test_nothing_is_wider_than_a_narrow_screen(width: int, page: Page, opened: Open) -> None:
    page.set_viewport_size({"width": width, "height": 640})
    table = f"|{' x |' * 40}\n|{'-|' * 40}"
    opened(text=f"{RICH}\n{'long' * 100}\n\n```\n{'wide ' * 100}\n```\n\n{table}")
    ask(page, "a" * 300)
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) == width
    for menu in ("#about", "#settings"):
        page.locator(f"{menu} summary").click()
        expect(page.locator(f"{menu} .panel")).to_be_visible()
        assert page.evaluate(wide) == width
    expect(page.locator("#about .panel")).to_be_hidden()
    for name in ("Send", "New chat", "Copy this answer"):
        box = page.get_by_role("button", name=name, exact=True).bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= width
        assert box["width"] >= 24 and box["height"] >= 24


def test_the_newest_text_stays_in_view_until_the_user_scrolls(page: Page, opened: Open) -> None:
    opened(text=SLOW, pause=0.01, pieces=12)
    ask(page, "Go", wait=False)
    left = "document.documentElement.scrollHeight - innerHeight - scrollY"
    expect(answer(page).locator(".body")).to_contain_text("paragraph 25")
    assert page.evaluate(left) < 4
    page.mouse.move(700, 300)
    page.mouse.wheel(0, -400)
    expect(page.locator("#to-end")).to_be_visible()
    done(page)
    assert page.evaluate(left) > 200
    page.locator("#to-end").click()
    expect(page.locator("#to-end")).to_be_hidden()
    assert page.evaluate(left) < 4


# ---- the package in the corner, and the files ----------------------------------------------------


def test_the_corner_says_what_the_package_is(page: Page, opened: Open) -> None:
    about = {**ABOUT, "fallback": "CUDA is not there", "adapters": ["pirate"]}
    opened(about=about)
    corner = page.locator("#about")
    expect(corner.locator("summary")).to_contain_text("Very close to the original")
    expect(corner.locator("summary")).to_contain_text("Verified on this machine")
    panel = corner.locator(".panel")
    for text in (
        "812 MB",
        "8,192 tokens",
        "pirate",
        "CUDA is not there",
        "91.2 %",
        "0.029 nats",
        "1.023",
        about["distance"]["sentence"],
        about["verified"]["sentence"],
    ):
        expect(panel).to_contain_text(text)
    assert panel.locator("[aria-current]").inner_text() == "very close"


@pytest.mark.parametrize(
    ("state", "words"),
    [("failed", "Verification failed"), ("not run", "Not verified on this machine")],
)
def test_the_corner_does_not_claim_what_is_not_known(
    state: str, words: str, page: Page, opened: Open
) -> None:
    distance: dict[str, Any] = {
        "grade": None,
        "grades": [],
        "figures": None,
        "sentence": "No certificate.",
    }
    verified = {"state": state, "sentence": "Why <b>so</b>."}
    opened(about={**ABOUT, "distance": distance, "verified": verified})
    summary = page.locator("#about summary")
    expect(summary).to_contain_text("Distance from the original unknown")
    expect(summary).to_contain_text(words)
    expect(page.locator("#about .panel")).to_contain_text("Why <b>so</b>.")
    assert page.locator("#about .panel b").count() == 0


def test_the_files_come_with_their_headers(served: tuple[str, Script]) -> None:
    url, _ = served
    for name, file in read_page().items():
        with urllib.request.urlopen(f"{url}/page/{name}") as response:
            assert response.read() == file.content
            assert response.headers["content-security-policy"] == POLICY
            assert response.headers["content-type"] == file.headers["content-type"]
            tag = response.headers["etag"]
        again = urllib.request.Request(f"{url}/page/{name}", headers={"If-None-Match": tag})
        with pytest.raises(HTTPError, match="304"):
            urllib.request.urlopen(again)
    for path in ("/page/no.js", "/page/../pages.py", "/page/%2e%2e/pages.py", "/page/"):
        with pytest.raises(HTTPError, match="404"):
            urllib.request.urlopen(url + path)
    with urllib.request.urlopen(url + "/openapi.json") as response:
        assert json.loads(response.read())["paths"] == {}
