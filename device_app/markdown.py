"""Markdown to HTML that is safe to show: what a model wrote comes from a machine we do not trust.

No HTML of the text survives, nothing is loaded from anywhere, and no address can be opened by accident: a link or an
image becomes inert text, with a button that carries the address in `data-url` for the page to show first. Neither
`style` nor `id` nor an event handler is ever written, so the HTML also stands under a Content-Security-Policy without
inline styles, and cannot pass for a part of the page around it.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_block import StateBlock
from markdown_it.rules_block.table import table
from markdown_it.token import Token

from device_app.text import without_control

MOST_NESTING = 20
MOST_COLUMNS = 50  # of a table; a wider one is shown as text
MOST_CHARACTERS = 100_000  # beyond it text is shown as it is: no answer is that long, and time is bounded
MOST_ADDRESS = 2048
MOST_LANGUAGE = 24  # characters of a code block's language that are shown
# They reorder what is read around them, so that an address or code would look like another (Trojan Source, 2021).
_REORDERING = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])

_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")  # a name, in ASCII (IDNA); or an address

Environment = MutableMapping[str, Any]
Tokens = Sequence[Token]


def render(text: str) -> list[str]:
    """The HTML of each top-level block of `text`, in order.

    Blocks before the last one seldom change as text grows, so a page need only replace those that did.
    """
    text = without_control(text).translate(_REORDERING)
    if len(text) > MOST_CHARACTERS:
        return [f"<p>{escapeHtml(text)}</p>\n"]
    parser = _parser()
    environment: Environment = {}
    blocks: list[list[Token]] = []
    depth = 0
    for token in parser.parse(text, environment):
        if depth == 0:
            blocks.append([])
        blocks[-1].append(token)
        depth += token.nesting
    return [str(parser.renderer.render(block, parser.options, environment)) for block in blocks]


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": MOST_NESTING}).enable(["table", "strikethrough"])
    parser.block.ruler.at("table", _table, {"alt": ["paragraph", "reference"]})
    for name, rule in _RULES.items():
        parser.add_render_rule(name, rule)
    return parser


def _table(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A table, unless it would have more cells than its text has characters.

    Rows are filled up to the columns of the head: a few thousand characters could become a million cells.
    """
    if not table(state, start, end, True):
        return False
    under_head = state.src[state.bMarks[start + 1] : state.eMarks[start + 1]]
    columns = sum(1 for part in under_head.split("|") if part.strip())
    last = _paragraph_end(state, start)
    characters = state.eMarks[last - 1] - state.bMarks[start]
    if columns > MOST_COLUMNS or columns * (last - start) > characters:
        return False
    return silent or table(state, start, end, False)


def _paragraph_end(state: StateBlock, line: int) -> int:
    """The first line after `line` that is blank, or the end. Looked for once a paragraph, not once a line of it."""
    if line >= state.env.get("paragraph_end", 0):
        state.env["paragraph_end"] = next((at for at in range(line, state.lineMax) if state.isEmpty(at)), state.lineMax)
    return int(state.env["paragraph_end"])


def _heading_open(_: Any, tokens: Tokens, index: int, options: Any, env: Environment) -> str:
    return f'<h{_level(tokens[index])} class="level-{tokens[index].tag[1:]}">'


def _heading_close(_: Any, tokens: Tokens, index: int, options: Any, env: Environment) -> str:
    return f"</h{_level(tokens[index])}>\n"


def _level(token: Token) -> int:
    """The page has headings of its own above those of an answer."""
    return min(int(token.tag[1:]) + 2, 6)


def _fence(_: Any, tokens: Tokens, index: int, options: Any, env: Environment) -> str:
    words = tokens[index].info.split()
    language = escapeHtml(words[0][:MOST_LANGUAGE]) if words else "text"
    return (
        f'<div class="code"><div class="code-head"><span>{language}</span>'
        '<button type="button" class="copy">Copy</button></div>'
        f'<pre tabindex="0"><code>{escapeHtml(tokens[index].content)}</code></pre></div>\n'
    )


def _link_open(_: Any, tokens: Tokens, index: int, options: Any, env: Environment) -> str:
    env.setdefault("addresses", []).append(str(tokens[index].attrs.get("href", "")))
    return '<span class="link">'


def _link_close(_: Any, tokens: Tokens, index: int, options: Any, env: Environment) -> str:
    return f"</span>{_address(env['addresses'].pop())}"


def _image(renderer: Any, tokens: Tokens, index: int, options: Any, env: Environment) -> str:
    token = tokens[index]
    shown = escapeHtml(renderer.renderInlineAsText(token.children or [], options, env))
    return f'<span class="image">Image: {shown or "no description"}</span>{_address(str(token.attrs.get("src", "")))}'


def _address(url: str) -> str:
    """A button for an address of the web, plain text for any other: no other scheme can be opened from an answer."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:  # of brackets that hold no IPv6 address
        parts, host = urlsplit(""), ""
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host) or len(url) > MOST_ADDRESS:
        return f' <span class="address">({escapeHtml(url[:MOST_ADDRESS])})</span>'
    return f' <button type="button" class="address" data-url="{escapeHtml(url)}">{escapeHtml(host)}</button>'


def _table_open(_: Any, tokens: Tokens, index: int, options: Any, env: Environment) -> str:
    return '<div class="table" role="region" aria-label="Table" tabindex="0"><table>\n'


def _table_close(_: Any, tokens: Tokens, index: int, options: Any, env: Environment) -> str:
    return "</table></div>\n"


def _cell_open(_: Any, tokens: Tokens, index: int, options: Any, env: Environment) -> str:
    align = str(tokens[index].attrs.get("style", "")).removeprefix("text-align:")
    shown = f' class="{align}"' if align in ("left", "center", "right") else ""
    return f"<{tokens[index].tag}{shown}>"


_RULES = {
    "heading_open": _heading_open,
    "heading_close": _heading_close,
    "fence": _fence,
    "code_block": _fence,
    "link_open": _link_open,
    "link_close": _link_close,
    "image": _image,
    "table_open": _table_open,
    "table_close": _table_close,
    "th_open": _cell_open,
    "td_open": _cell_open,
}
