"""Markdown that is painted while it streams looks in the end as if it had come at once, whatever the pieces were."""

from __future__ import annotations

import io
import random
import re

import pytest
from rich.console import Console

from device_app.live_markdown import LiveMarkdown
from tests.terminals import Screen

ANSWER = """# A title

Some *emphasis* and **bold** text that goes on for quite a while, so that it wraps over the end of the line. `code`
a line of its own, 2 * 3 * 4 and snake_case_names

1. one

2. two
   - nested
     deeper

| a | b |
|---|---|
| 1 | 2 |

```python
def double(x):
    return 2 * x  # twice
```

> quoted

Setext
------
done, 你好 and so on
"""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0  # so that every piece is painted
        return self.now


def shown(pieces: list[str], columns: int = 40, rows: int = 12, **options: object) -> list[str]:
    """The lines that a terminal shows in the end."""
    screen = Screen(columns, rows)
    console = Console(file=io.StringIO(), force_terminal=True, width=columns, height=rows, **options)  # type: ignore[arg-type]
    live = LiveMarkdown(screen, console=console, clock=Clock())  # type: ignore[arg-type]
    for piece in pieces:
        live.push(piece)
    live.finish()
    assert screen.lines.pop() == ""  # the cursor is below
    return [line.rstrip() for line in screen.lines]


def text(markup: str) -> str:
    return "\n".join(shown([markup]))


@pytest.mark.parametrize("seed", range(8))
def test_the_pieces_do_not_change_what_is_shown(seed: int) -> None:
    draw, pieces, at = random.Random(seed), [], 0
    while at < len(ANSWER):
        size = draw.choice([1, 2, 3, 5, 8, 40])
        pieces.append(ANSWER[at : at + size])
        at += size
    whole = [block + "\n\n" for block in ANSWER.split("\n\n")]
    assert [line for line in shown(pieces) if line] == [line for line in shown(whole) if line]


def test_what_is_done_is_not_written_again() -> None:
    file = io.StringIO()
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)
    live = LiveMarkdown(file, console=console, clock=Clock())
    live.push("The first paragraph.\n\nThe second")
    first = file.tell()
    for _ in range(50):
        live.push(" word")
    live.finish()
    assert "first paragraph" not in file.getvalue()[first:]
    assert file.getvalue()[first:].count("The second") <= 15  # once for each word of its first line, then no more


def test_nothing_is_painted_more_often_than_the_eye_sees() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    file = io.StringIO()
    live = LiveMarkdown(file, console=console, clock=lambda: 1.0)  # time stands still
    for _ in range(1000):
        live.push("word ")
    assert file.getvalue() == "word"
    live.finish()
    assert file.getvalue().count("word") == 1 + 1000  # the first one twice


def test_a_block_higher_than_the_window_is_painted_without_reaching_above_it() -> None:
    code = "```\n" + "".join(f"line {number}\n" for number in range(40)) + "```\n"
    pieces = [code[at : at + 7] for at in range(0, len(code), 7)]
    assert shown(pieces, rows=6)[-40:] == [f"line {number}" for number in range(40)]


def test_html_images_and_links_hide_nothing() -> None:
    assert text("<script>alert(1)</script>") == "<script>alert(1)</script>"
    assert text("a <b>word</b>") == "a <b>word</b>"
    assert text("[bank](http://evil.example/)") == "bank (http://evil.example/)"
    assert text("![cat](http://e.example/c.png)") == "!cat (http://e.example/c.png)"


def test_entities_bring_no_control_characters() -> None:
    output = io.StringIO()
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)
    live = LiveMarkdown(output, console=console)
    live.push(
        "&#27;[31m &#13; &#7; &#155;31m &#x1b;]0;title&#7;\n\n`&#27;` [a](http://x/&#27;%1b)\n\n```&#13;\n&#27;[2J\n```"
    )
    live.finish()
    assert not {character for character in output.getvalue() if ord(character) < 32 or 127 <= ord(character) < 160} - {
        "\n"
    }


def test_single_line_ends_are_kept() -> None:
    assert text("Roses are red\nViolets are blue") == "Roses are red\nViolets are blue"


def test_line_ends_that_markdown_does_not_know_lose_nothing() -> None:
    file = io.StringIO()
    live = LiveMarkdown(file, console=Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None))
    live.push("one\u2028two\n\nthree\u2029four\n\nfive six")
    live.finish()
    assert re.findall(r"\w+", file.getvalue()) == ["one", "two", "three", "four", "five", "six"]


def test_colours_are_left_out_where_they_are_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def written() -> str:
        file = io.StringIO()
        live = LiveMarkdown(file, console=Console(file=file, force_terminal=True, width=80, color_system="standard"))
        live.push("```python\nreturn 1\n```\n\n`code` 1. [a](b)")
        live.finish()
        return file.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[94" in written() or "\x1b[34" in written()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = written()
    codes = {code for sequence in re.findall(r"\x1b\[([0-9;]*)m", plain) for code in sequence.split(";")}
    assert codes <= {"", "0", "1", "2", "3", "4", "7", "9"}
