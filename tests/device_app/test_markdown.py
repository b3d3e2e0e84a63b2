"""Markdown of a hostile author: what of it may reach a page."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_app.markdown import MOST_CHARACTERS, render

TAGS = {"p", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "em", "strong", "s", "br", "hr"}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td", "div", "span", "button"}
ATTRIBUTES = {"class", "data-url", "type", "tabindex", "role", "aria-label", "start"}
PIECES = [
    "<",
    ">",
    '"',
    "'",
    "&",
    "`",
    "```",
    "[a](",
    "![a](",
    ")",
    "](",
    "<a href=",
    "\n",
    "\n\n",
    "    ",
    "- ",
    "1. ",
]
PIECES += [
    "> ",
    "# ",
    "|",
    "|-|\n",
    "\\",
    "javascript:x",
    "https://a.example/?x=",
    "<script>",
    "onclick=",
    "*",
    "_",
    "~~",
]
PIECES += ["[x]: ", "&lt;script&gt;", "&#x3c;b&#x3e;", "\u202e", "\x1b]0;x\x07", "\x00", "a", "é", "𝄞", "\ud800"]


class Seen(HTMLParser):
    """The tags and attributes of a piece of HTML, and the text outside them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_data(self, data: str) -> None:
        self.text += data


def html(text: str) -> str:
    """All blocks together."""
    return "".join(render(text))


def test_html_in_the_text_is_text() -> None:
    seen = Seen(html("<script>x()</script> <img src=x onerror=x()>\n\n<div onclick=x()>y</div>"))

    assert seen.tags == {"p"}
    assert "<script>x()</script> <img src=x onerror=x()>" in seen.text


def test_a_link_is_text_and_a_button_that_names_its_host() -> None:
    assert html('[text](https://a.example/b?c=1&d="2")') == (
        '<p><span class="link">text</span> <button type="button" class="address" '
        'data-url="https://a.example/b?c=1&amp;d=%222%22">a.example</button></p>\n'
    )


def test_an_image_is_not_loaded() -> None:
    seen = Seen(html("![a **picture**](https://a.example/pixel.png)"))

    assert "img" not in seen.tags
    assert "Image: a picture" in seen.text
    assert ("data-url", "https://a.example/pixel.png") in seen.attributes


@pytest.mark.parametrize(
    "address",
    ["javascript:alert(1)", "data:text/html,x", "file:///etc/passwd", "mailto:a@b.example", "/here", "https://[", "#x"],
)
def test_only_addresses_of_the_web_get_a_button(address: str) -> None:
    assert "button" not in Seen(html(f"[text]({address}) ![picture]({address})")).tags


def test_a_host_that_looks_like_another_is_shown_as_what_it_is() -> None:
    assert "xn--" in Seen(html("[bank](https://bаnk.example)")).text  # the second letter is Cyrillic


def test_characters_that_reorder_text_or_steer_a_terminal_are_left_out() -> None:
    assert html("a\u202eb\u2066c\x1b[2Jd") == "<p>abc[2Jd</p>\n"


def test_code_keeps_its_text_and_names_its_language() -> None:
    seen = Seen(html('```py" onload="x\nif a < b:\n\tpass\n```'))

    assert "if a < b:\n\tpass\n" in seen.text
    assert 'py"' in seen.text
    assert {name for name, _ in seen.attributes} <= ATTRIBUTES


def test_a_table_is_aligned_without_a_style() -> None:
    assert '<th class="right">a</th>' in html("| a |\n|--:|\n| b |")


@pytest.mark.parametrize(
    ("columns", "rows", "copies"), [(1000, 1000, 1), (50, 1000, 1), (10, 100, 30), (3, 4, 100)], ids=str
)
def test_the_html_of_a_table_grows_with_its_text_alone(columns: int, rows: int, copies: int) -> None:
    text = ("|a" * columns + "\n" + "|:-:" * columns + "\n" + "|\n" * rows + "\n") * copies

    assert len(html(text)) < 25 * len(text)


def test_a_table_with_cells_left_out_is_filled_up() -> None:
    shown = html("before\n| name | price |\n|:---|---:|\n| a |\n| b | 2 |\n\n- | c | d |\n  |---|---|\n  | 3 |")

    assert (shown.count("<table>"), shown.count("<td"), shown.count("<p>")) == (2, 6, 1)


def test_headings_come_below_those_of_the_page() -> None:
    assert html("# a") == '<h3 class="level-1">a</h3>\n'


def test_a_growing_text_changes_its_last_blocks_alone() -> None:
    text = "One.\n\n- two\n- three\n\n```\nfour\n```\n\nFive."
    for length in range(len(text)):
        before, after = render(text[:length]), render(text[: length + 1])
        assert before[: len(before) - 1] == after[: len(before) - 1]


def test_a_text_beyond_all_bounds_is_shown_plainly() -> None:
    [block] = render("[<" * MOST_CHARACTERS)

    assert block.startswith("<p>[&lt;[&lt;")


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_no_text_makes_another_tag_or_attribute_than_these(text: str) -> None:
    seen = Seen(html(text))

    assert seen.tags <= TAGS
    assert {name for name, _ in seen.attributes} <= ATTRIBUTES
    for name, value in seen.attributes:
        assert name != "data-url" or value.startswith(("https://", "http://"))
