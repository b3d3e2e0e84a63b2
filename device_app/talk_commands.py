"""What a talk can do beside answering: lines that begin with a slash."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from device_app.conversation import Said, image_part
from device_app.history import Chat, text_of
from device_app.terminal import note
from device_app.text import printable, without_control
from shared.errors import UsageError

if TYPE_CHECKING:
    from device_app.talk import Talk

MOST_LISTED = 30  # chats


def carry_out(talk: Talk, text: str) -> bool:
    """Does what a command says. False where `text` is a question: one that begins like a path is, or with a blank.

    Raises UsageError for a command that there is not.
    """
    match = re.fullmatch(r"/([A-Za-z]*)(?:\s+(.*))?", text, re.DOTALL)
    if match is None:
        return False
    name, argument = match[1], (match[2] or "").strip()
    if name not in COMMANDS:
        raise UsageError(
            f"/{name}: seen no command of this name", hint="/help lists them; a blank before it asks it as it is"
        )
    COMMANDS[name][2](talk, argument)
    return True


def _help(talk: Talk, argument: str) -> None:
    rows = [(f"/{name} {takes}".rstrip(), does) for name, (takes, does, _) in COMMANDS.items()]
    width = max(len(row[0]) for row in rows)
    keys = "Enter sends, Alt-Enter begins a line, Tab completes, Up and Ctrl-R find earlier questions.\n"
    note("\n".join(f"{row[0]:{width}}  {row[1]}" for row in rows))
    note((keys if talk.edits else "") + "Ctrl-C stops an answer, Ctrl-D leaves.")


def _image(talk: Talk, argument: str) -> None:
    talk.assistant.bundle.want_kind("/image", "vision-decoder")
    file = _file(argument, "/image")
    talk.conversation.images.append(image_part(file))
    note(f"{printable(file)} goes with the next question.")


def _system(talk: Talk, argument: str) -> None:
    if not argument:
        note(without_control(talk.conversation.system or "") or "There is no system prompt.")
    elif argument == "off":
        talk.conversation.instruct(None)
        note("There is no system prompt any more.")
    else:
        talk.conversation.instruct(argument)
        note("System prompt set. /system off removes it.")


def _regenerate(talk: Talk, argument: str) -> None:
    turn = talk.conversation.again()
    if not talk.sampling.temperature:
        note("(temperature 0: the same question has the same answer; --temperature 0.8 gives others)")
    talk.ask(turn, talk.tries + 1)


def _edit(talk: Talk, argument: str) -> None:
    before = talk.conversation.question()
    if not argument and not talk.edits:
        raise UsageError("/edit: seen nothing, wanted the question as it should be")
    text = argument or talk.keyboard.read(before)
    if text.strip():
        talk.ask(talk.conversation.instead(text))
    else:
        note("The question stays as it was.")


def _save(talk: Talk, argument: str) -> None:
    path = Path(_file(argument, "/save")).expanduser()
    conversation = talk.conversation
    if not conversation.messages:
        raise UsageError("/save: seen nothing that was said, wanted a question and its answer")
    said = [Said("system", conversation.system)] if conversation.system else []
    said += conversation.messages
    if path.suffix == ".json":
        text = json.dumps({"messages": [vars(one) for one in said]}, ensure_ascii=False, indent=1) + "\n"
    else:
        text = "\n\n".join(f"## {one.role}\n\n{text_of(one.content)}" for one in said) + "\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"/save {printable(str(path))}: {error.strerror}", hint="name another file") from None
    note(f"Saved in {printable(str(path))}.")


def _stats(talk: Talk, argument: str) -> None:
    stats = talk.answered
    counters = [one.counters for one in stats]
    tokens, round_trips = sum(one.tokens for one in stats), sum(one.round_trips for one in counters)
    seconds = sum(one.seconds for one in stats)
    lines = [
        f"{len(stats)} answer{'s' * (len(stats) != 1)}, {tokens} tokens in {seconds:.1f} s, {round_trips} round trips"
        + (f" ({round_trips / tokens:.2f} a token)" if tokens else ""),
        f"drafts: {sum(one.drafted for one in counters)} tokens, "
        f"{sum(one.accepted for one in counters)} of them accepted",
        f"left the device: {sum(one.vectors_up for one in counters)} permuted vectors, "
        f"{sum(one.bytes_up for one in counters) / 1024:.0f} KiB; no text",
        f"came back: {sum(one.bytes_down for one in counters) / 1024:.0f} KiB",
        f"in the cloud: {sum(one.queue_us for one in counters) / 1e6:.2f} s waiting, "
        f"{sum(one.compute_us for one in counters) / 1e6:.2f} s computing",
        f"lost connections taken up again: {sum(one.resumes + one.replays for one in counters)}",
    ]
    if (network := talk.assistant.round_trip_seconds) is not None:
        lines.append(f"a round trip over the network: {network * 1000:.1f} ms")
    note("\n".join(lines))


def _new(talk: Talk, argument: str) -> None:
    talk.conversation.begin()
    note("A new chat.")


def _chats(talk: Talk, argument: str) -> None:
    talk.listed = talk.conversation.history.chats(argument)
    if not talk.listed:
        note("No chat holds that." if argument else "No chat is kept.")
    for number, chat in enumerate(talk.listed[:MOST_LISTED], 1):
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(chat.changed))
        here = "  (this one)" if chat.id == talk.conversation.chat_id else ""
        note(f"{number:3}  {changed}  {printable(chat.title) or 'untitled'}{here}")
    if len(talk.listed) > MOST_LISTED:
        note(f"     and {len(talk.listed) - MOST_LISTED} more: /chats WORD finds those that hold a word")


def _open(talk: Talk, argument: str) -> None:
    talk.conversation.open(_numbered(talk, argument, "/open"))
    for said in talk.conversation.messages[-2:]:
        text = without_control(text_of(said.content))
        if said.role == "user":
            note(f"\n> {text}")
        else:
            screen = talk.screen()
            screen.push(text)
            screen.finish()


def _delete(talk: Talk, argument: str) -> None:
    chat = _numbered(talk, argument, "/delete")
    talk.conversation.history.delete(chat.id)
    talk.listed.remove(chat)
    if chat.id == talk.conversation.chat_id:
        talk.conversation.begin()
    note(f"Deleted: {printable(chat.title) or 'untitled'}")


def _numbered(talk: Talk, argument: str, command: str) -> Chat:
    """The chat of a number, as /chats listed them last."""
    talk.listed = talk.listed or talk.conversation.history.chats()
    if not argument.isdecimal() or not 0 < int(argument) <= len(talk.listed):
        raise UsageError(
            f"{command}: seen {printable(argument) or 'nothing'!r}, wanted a number from 1 to {len(talk.listed)}",
            hint="/chats lists them",
        )
    return talk.listed[int(argument) - 1]


def _file(argument: str, command: str) -> str:
    """The file that is meant: its name as it is, or quoted as a shell and a file dropped on a terminal do."""
    if not argument:
        raise UsageError(f"{command}: seen nothing, wanted a file")
    with suppress(ValueError):  # a quote without its other half is part of the name
        words = shlex.split(argument)
        if len(words) == 1 and not Path(argument).exists():
            argument = words[0]
    return str(Path(argument).expanduser())


# name → what it takes, what it does, and who does it
COMMANDS: dict[str, tuple[str, str, Callable[[Talk, str], None]]] = {
    "help": ("", "lists the commands", _help),
    "new": ("", "begins a new chat", _new),
    "regenerate": ("", "answers the last question again", _regenerate),
    "edit": ("[TEXT]", "changes the last question and asks it again", _edit),
    "image": ("FILE", "shows an image with the next question", _image),
    "system": ("[TEXT]", "sets the system prompt, or tells it; off removes it", _system),
    "save": ("FILE", "saves this chat as Markdown, or as JSON where the name ends in .json", _save),
    "stats": ("", "tells what this talk took and what left the device", _stats),
    "chats": ("[WORD]", "lists the chats that are kept here, or those that hold a word", _chats),
    "open": ("NUMBER", "goes on with a chat of the list", _open),
    "delete": ("NUMBER", "deletes a chat of the list for good", _delete),
}
FILES = ("image", "save")  # commands that take a file
