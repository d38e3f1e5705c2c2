"""The files of the chat page: whole, self-contained, with nothing that its policy forbids."""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser
from posixpath import dirname, join, normpath

import pytest

from llama_onnx.runtime.serving.pages import INDEX, POLICY, read_page

PAGE = read_page()
OURS = {name: file.content.decode() for name, file in PAGE.items() if "vendor/" not in name}
README = PAGE["vendor/README.txt"].content.decode()


class Tags(HTMLParser):
    """The elements of a page with their attributes, and the text in scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.inline += data


def read_index() -> Tags:
    tags = Tags()
    tags.feed(OURS[INDEX])
    assert len(tags.tags) > 50
    return tags


def test_the_policy_lets_the_page_load_from_its_own_server_only() -> None:
    assert POLICY.split("; ") == [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]


def test_the_html_has_no_script_or_style_of_its_own() -> None:
    index = read_index()
    assert index.inline.strip() == ""
    attributes = {name for _, attrs in index.tags for name in attrs}
    assert not {name for name in attributes if name == "style" or name.startswith("on")}


def test_every_file_that_is_named_is_there() -> None:
    named = {
        value.removeprefix("page/")
        for _, attributes in read_index().tags
        for key in ("src", "href")
        if (value := attributes.get(key)) and not value.startswith("#")
    }
    for name, text in OURS.items():
        if name.endswith(".js"):
            found = re.findall(r'^(?:import|export) .*?from "(.+?)";$', text, re.MULTILINE)
            named |= {normpath(join(dirname(name), module)) for module in found}
    assert named <= PAGE.keys()
    used = {name for name in PAGE if name.endswith((".js", ".css", ".svg"))}
    assert used - named == set()


@pytest.mark.parametrize("name", OURS)
def test_nothing_names_another_server(name: str) -> None:
    found = set(re.findall(r"(?:https?:)?//[\w-]+\.[\w.]+", OURS[name]))
    assert found <= {"http://www.w3.org"}  # the name of SVG, which nobody loads


def test_every_file_has_a_type_and_the_headers_of_the_page() -> None:
    for name, file in PAGE.items():
        assert file.headers["content-security-policy"] == POLICY
        assert file.headers["x-content-type-options"] == "nosniff"
        assert file.headers["referrer-policy"] == "no-referrer"
        assert file.headers["content-type"], name


@pytest.mark.parametrize("name", [name for name in OURS if name.endswith(".js")])
def test_a_module_is_short(name: str) -> None:
    assert len(OURS[name].splitlines()) < 300


@pytest.mark.parametrize(
    ("name", "version"), [("marked.esm.js", "marked 18.2.1"), ("purify.min.js", "dompurify 3.4.18")]
)
def test_a_library_is_the_one_that_its_line_names(name: str, version: str) -> None:
    entry = README.partition(version)[2].partition("\n\n")[0]
    hashed = hashlib.sha256(PAGE[f"vendor/{name}"].content).hexdigest()
    assert name in entry and f"sha256 {hashed}" in entry
    licence = re.findall(r"[\w.]+\.LICENSE\.txt", entry)
    assert len(PAGE[f"vendor/{licence[0]}"].content) > 1000
    assert version.split()[1].encode() in PAGE[f"vendor/{name}"].content[:300]
