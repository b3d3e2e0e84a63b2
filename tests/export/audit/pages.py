"""Pages as a browser takes them apart, for tests of what is in them."""

from __future__ import annotations

import re
from html.parser import HTMLParser

LOADING = {"script", "link", "iframe", "object", "embed", "base", "form", "img"}
ADDRESSES = ("src", "srcset", "href", "xlink:href", "data", "action", "poster", "background")


class Elements(HTMLParser):
    """Every start tag with its attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_nothing_is_loaded_or_run(shown: str) -> None:
    """No element that loads or runs, no handler, and no address but of places within the page."""
    elements = Elements(shown)
    assert not LOADING & {tag for tag, _ in elements.tags}
    for _, attributes in elements.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert all((attributes.get(name) or "#").startswith("#") for name in ADDRESSES)
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", shown))
    assert "://" not in shown and "@import" not in shown
