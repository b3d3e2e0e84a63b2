"""Text as it becomes certain: nothing lost, nothing of a stop string, no terminal control."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_app.text import TextStream, one_line, printable, without_control

# Few characters, so that beginnings of stop strings are met often.
pieces = st.lists(st.text("ab\n", max_size=4), max_size=12)
stop_string = st.text("ab\n", min_size=1, max_size=4)
any_text = st.text(st.characters(exclude_categories=["Cs"]))


class Pieces:
    """A detokenizer whose token i is the text `pieces[i]`, and whose end is `tail`."""

    def __init__(self, pieces: Sequence[str], tail: str = "") -> None:
        self._pieces = pieces
        self._tail = tail

    def push(self, token: int) -> str:
        return self._pieces[token]

    def finish(self) -> str:
        return self._tail


def shown(pieces: Sequence[str], tail: str = "", stop: Sequence[str] = ()) -> tuple[str, bool]:
    """All that is shown of some pieces, and whether a stop string ended it."""
    stream = TextStream(Pieces(pieces, tail), (), stop)  # type: ignore[arg-type]
    text = "".join(stream.push(token) for token in range(len(pieces)))
    return text + stream.finish(), stream.stopped


@given(st.lists(any_text), any_text)
def test_the_pieces_together_are_the_whole_without_control(pieces: list[str], tail: str) -> None:
    assert shown(pieces, tail) == (without_control("".join(pieces) + tail), False)


@given(st.lists(any_text))
def test_without_stop_strings_nothing_is_held_back(pieces: list[str]) -> None:
    stream = TextStream(Pieces(pieces), ())  # type: ignore[arg-type]
    assert [stream.push(token) for token in range(len(pieces))] == [without_control(piece) for piece in pieces]
    assert stream.finish() == ""


@given(pieces, st.text("ab\n", max_size=4), stop_string)
def test_text_ends_before_a_stop_string_however_it_is_cut_into_pieces(pieces: list[str], tail: str, stop: str) -> None:
    before, met, _ = ("".join(pieces) + tail).partition(stop)
    assert shown(pieces, tail, [stop]) == (before, bool(met))


@given(pieces, st.lists(stop_string, min_size=1, max_size=3))
def test_of_several_stop_strings_none_is_shown(pieces: list[str], stop: list[str]) -> None:
    text, stopped = shown(pieces, "", stop)
    whole = "".join(pieces)
    assert not any(one in text for one in stop)
    assert stopped == any(one in whole for one in stop)
    assert whole.startswith(text) if stopped else whole == text


@given(pieces, stop_string)
def test_no_more_is_held_back_than_could_begin_a_stop_string(pieces: list[str], stop: str) -> None:
    stream = TextStream(Pieces(pieces), (), [stop])  # type: ignore[arg-type]
    text = whole = ""
    for token, piece in enumerate(pieces):
        text, whole = text + stream.push(token), whole + piece
        if stream.stopped:
            break
        held = whole[len(text) :]
        assert whole.startswith(text) and stop.startswith(held) and held != stop


def test_text_that_turns_out_to_be_no_stop_string_is_released() -> None:
    stream = TextStream(Pieces(["one E", "N", "", "d", " two"]), (), ["END"])  # type: ignore[arg-type]
    assert [stream.push(token) for token in range(5)] == ["one ", "", "", "ENd", " two"]


def test_a_stop_string_that_never_came_to_its_end_is_shown_at_the_end() -> None:
    assert shown(["one EN"], "", ["END"]) == ("one EN", False)


def test_nothing_comes_after_a_stop_string() -> None:
    stream = TextStream(Pieces(["a END b", "c"], tail="d"), (), ["END"])  # type: ignore[arg-type]
    assert [stream.push(0), stream.push(1), stream.finish()] == ["a ", "", ""]


def test_empty_stop_strings_are_none() -> None:
    assert shown(["a", "b"], "c", ["", ""]) == ("abc", False)


def test_special_tokens_are_not_shown() -> None:
    stream = TextStream(Pieces(["a", "<|end|>", "b"]), [1])  # type: ignore[arg-type]
    assert [stream.push(token) for token in range(3)] == ["a", "", "b"]


def test_special_tokens_may_be_written_as_text() -> None:
    assert shown(["<|", "end|>"]) == ("<|end|>", False)


@given(st.text())
def test_no_control_character_but_line_feed_and_tab_passes(text: str) -> None:
    safe = without_control(text)
    assert not [character for character in safe if unicodedata.category(character) == "Cc" and character not in "\n\t"]
    kept = [character for character in text if unicodedata.category(character) != "Cc" or character in "\n\t"]
    assert safe == "".join(kept)


@pytest.mark.parametrize(
    ("attack", "left"),
    [
        ("\x1b[2J\x1b[1;31mred", "[2J[1;31mred"),
        ("\x1b]0;title\x07", "]0;title"),
        ("\x9b2Jcleared", "2Jcleared"),  # C1: one character that means ESC [
        ("\x90q\x9c", "q"),
        ("shown\roverwritten", "shownoverwritten"),
        ("line\r\nline", "line\nline"),
        ("\x08\x08\x7f", ""),
        ("a\x00b\x85c", "abc"),
        ("a\tb\nc", "a\tb\nc"),
    ],
)
def test_escape_sequences_lose_what_makes_them_work(attack: str, left: str) -> None:
    assert shown([attack]) == (left, False)
    assert shown(list(attack)) == (left, False)  # also a character at a time


@given(st.lists(st.text("ab\x1b\r", max_size=4), max_size=8), st.text("ab", min_size=1, max_size=3))
def test_control_characters_do_not_hide_a_stop_string(pieces: list[str], stop: str) -> None:
    before, met, _ = without_control("".join(pieces)).partition(stop)
    assert shown(pieces, "", [stop]) == (before, bool(met))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\r\n\tc", "a b c"),
        ("  a \u2028 b\u0085", "a b"),
        ("a\x1b[2Jb\x9b1A\x00", "a[2Jb1A"),
        ("", ""),
        (" \n\x07\n ", ""),
        ("a \x07 b", "a b"),
    ],
)
def test_one_line_is_one_line_without_control_characters(text: str, line: str) -> None:
    assert one_line(text) == line


def test_printable_replaces_what_is_not() -> None:
    assert printable("käse\n\x1b\udce9\u202e.png") == "käse????.png"
