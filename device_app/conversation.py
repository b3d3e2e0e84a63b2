"""A conversation: what was said, what goes with the next question, and its copy in the history."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_app.history import Chat, Content, History, text_of, title_of
from shared.errors import HistoryError, UsageError

Part = dict[str, Any]


@dataclass(frozen=True)
class Said:
    """One message. Content as the history keeps it: text, or parts as in OpenAI's API."""

    role: str
    content: Content


@dataclass(frozen=True)
class Turn:
    """A question that is to be answered. It is part of the conversation once there is something of an answer."""

    keep: int  # messages before it that stay
    question: Content | None  # None: the last message that stays is the question


class Conversation:
    """Messages in turn, the user's and the assistant's, and a system prompt before them.

    A history that fails is told of once; the conversation goes on, and this chat is kept no further.
    """

    def __init__(
        self, history: History, *, model: str, system: str | None, on_lost: Callable[[HistoryError], None]
    ) -> None:
        """on_lost: told when the history fails."""
        self.history = history
        self.system = system
        self.images: list[Part] = []  # that go with the next question
        self.messages: list[Said] = []
        self._model = model
        self._chat: Chat | None = None  # once something was said
        self._keeping = True
        self._on_lost = on_lost

    @property
    def chat_id(self) -> str | None:
        """Of the copy in the history, if there is one."""
        return self._chat.id if self._chat else None

    def begin(self) -> None:
        """Forgets what was said here, as a new chat does; the system prompt and the history stay."""
        self.messages, self.images, self._chat, self._keeping = [], [], None, True

    def open(self, chat: Chat) -> None:
        """Goes on with a chat of the history. Raises HistoryError."""
        messages = self.history.messages(chat.id)
        self.begin()
        self._chat = chat
        self.messages = [Said(message.role, message.content) for message in messages if message.role != "system"]
        self.system = chat.settings.get("system")

    def instruct(self, system: str | None) -> None:
        """Sets the system prompt, for all that was said before too."""
        self.system = system
        if self._chat is not None:
            chat_id, settings = self._chat.id, {**self._chat.settings, "system": system}
            self._keep(lambda: self.history.change(chat_id, settings=settings))

    def next(self, text: str) -> Turn:
        """A question that follows, with the images that wait for it."""
        return Turn(len(self.messages), [*self.images, {"type": "text", "text": text}] if self.images else text)

    def again(self) -> Turn:
        """The last question, for another answer. Raises UsageError where there is none."""
        return Turn(self._last_question() + 1, None)

    def instead(self, text: str) -> Turn:
        """A question in the last one's place, with its images. Raises UsageError where there is none."""
        last = self._last_question()
        before = self.messages[last].content
        images = [part for part in before if part["type"] != "text"] if isinstance(before, list) else []
        return Turn(last, [*images, {"type": "text", "text": text}] if images else text)

    def question(self) -> str:
        """The text of the last question. Raises UsageError where there is none."""
        return text_of(self.messages[self._last_question()].content)

    def prompt(self, turn: Turn) -> list[Part]:
        """The messages up to this question, as the assistant takes them."""
        said = self.messages[: turn.keep] + ([Said("user", turn.question)] if turn.question is not None else [])
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *({"role": one.role, "content": _looked_at(one.content)} for one in said)]

    def asked(self, turn: Turn) -> None:
        """Takes the question in. What it replaces is forgotten."""
        if turn.keep < len(self.messages):
            del self.messages[turn.keep :]
            if (chat := self._chat) is not None:
                self._keep(lambda: self.history.cut(chat.id, turn.keep))
        if turn.question is not None:
            self.images = []
            self._say("user", turn.question)

    def answered(self, text: str, **details: Any) -> None:
        """Takes in the answer to the last question. details: figures, in JSON."""
        self._say("assistant", text, **details)

    def _last_question(self) -> int:
        for number, said in reversed(list(enumerate(self.messages))):
            if said.role == "user":
                return number
        raise UsageError("chat: seen no question yet, wanted one")

    def _say(self, role: str, content: Content, **details: Any) -> None:
        self.messages.append(Said(role, content))
        self._keep(lambda: self._append(role, content, details))

    def _append(self, role: str, content: Content, details: dict[str, Any]) -> None:
        if self._chat is None:
            settings = {"system": self.system} if self.system else {}
            self._chat = self.history.new(model=self._model, title=title_of(content), settings=settings)
        self.history.append(self._chat.id, role, content, **details)

    def _keep(self, change: Callable[[], object]) -> None:
        if not self._keeping:
            return
        try:
            change()
        except HistoryError as error:
            self._keeping, self._chat = False, None
            self._on_lost(error)


def image_part(file: str) -> Part:
    """An image for a question, as the history keeps it: the file itself. Raises UsageError for what is no image."""
    from PIL import Image

    from device_app.images import open_image

    open_image(file)
    data = Path(file).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        kind = Image.MIME.get(image.format or "", "application/octet-stream")
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def _looked_at(content: Content) -> Content:
    """Content with images as the assistant takes them."""
    if isinstance(content, str):
        return content
    return [part if part["type"] == "text" else {"type": "image", "image": _bytes(part)} for part in content]


def _bytes(part: Part) -> bytes:
    try:
        return base64.b64decode(part["image_url"]["url"].partition(",")[2])
    except (KeyError, ValueError):
        raise UsageError("image: seen a part that is not a data URL in base64, wanted one") from None
