"""What was said in each chat: as the history keeps it, or, where the disk refused, as long as the gateway runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from device_app.history import Content, History
from shared.errors import HistoryError

Line = tuple[str, Content]  # role and content of a message


class Lines:
    """The lines of all chats. What cannot be kept is said, and the chat goes on without."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._beside: dict[str, list[Line]] = {}  # by chat: all lines, of chats whose last could not be kept

    async def of(self, chat_id: str) -> list[Line]:
        """Everything that was said in a chat. Raises HistoryError."""
        if chat_id in self._beside:
            return list(self._beside[chat_id])
        messages = await asyncio.to_thread(self._history.messages, chat_id)
        return [(message.role, message.content) for message in messages]

    async def put(
        self,
        chat_id: str,
        before: Sequence[Line],
        line: Line | None,
        *,
        cut: bool = False,
        title: str = "",
        details: dict[str, Any] | None = None,
    ) -> str | None:
        """Makes a chat those `before`, and a new line. Gives what to tell the user where that cannot be kept.

        cut: whether there are more than those `before` now. title: for a chat that has none.
        """

        def change() -> None:
            if cut:
                self._history.cut(chat_id, len(before))
            if line is not None:
                self._history.append(chat_id, *line, **(details or {}))
            if title:
                self._history.change(chat_id, title=title)

        reason = "what came before it is not kept either"
        if chat_id not in self._beside:
            try:
                await asyncio.shield(asyncio.to_thread(change))
            except HistoryError as error:
                reason = str(error) + (f" ({error.hint})" if error.hint else "")
            else:
                return None
        self._beside[chat_id] = [*before, line] if line is not None else list(before)
        return f"This is not kept: {reason}"

    def forget(self, chat_id: str | None) -> None:
        """Of a chat that was deleted; None: of all."""
        if chat_id is None:
            self._beside.clear()
        else:
            self._beside.pop(chat_id, None)
