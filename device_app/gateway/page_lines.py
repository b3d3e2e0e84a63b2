"""What was said in each chat: as the history keeps it, or, while the disk refuses, in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from device_app.gateway.page_chats import Chats
from device_app.history import StoredMessage
from shared.errors import HistoryError


class Lines:
    """The messages of all chats. What cannot be kept is said, and the chat goes on; with the next message all of it
    is tried again."""

    def __init__(self, chats: Chats) -> None:
        self._chats = chats
        self._beside: dict[str, list[StoredMessage]] = {}  # by chat: all of it, of chats that could not be kept

    async def of(self, chat_id: str) -> list[StoredMessage]:
        """Everything that was said in a chat. Raises HistoryError."""
        if chat_id in self._beside:
            return list(self._beside[chat_id])
        return await asyncio.to_thread(self._chats.of(chat_id).messages, chat_id)

    async def put(
        self, chat_id: str, before: Sequence[StoredMessage], new: Sequence[StoredMessage], *, title: str = ""
    ) -> str | None:
        """Makes a chat its first messages, those `before`, and `new` ones. Gives what to tell the user where that
        cannot be kept.

        title: for a chat that has none.
        """
        whole = [*before, *new]
        keep = 0 if chat_id in self._beside else len(before)
        history = self._chats.of(chat_id)
        try:
            await asyncio.shield(asyncio.to_thread(lambda: history.replace(chat_id, keep, whole[keep:], title=title)))
        except HistoryError as error:
            self._beside[chat_id] = whole
            return _not_kept(error)
        self._beside.pop(chat_id, None)
        refusal = self._chats.refusal(chat_id)
        return None if refusal is None else _not_kept(refusal)

    def forget(self, chat_id: str | None) -> None:
        """Of a chat that was deleted; None: of all."""
        if chat_id is None:
            self._beside.clear()
        else:
            self._beside.pop(chat_id, None)


def _not_kept(error: HistoryError) -> str:
    return f"This is not kept: {error}" + (f" ({error.hint})" if error.hint else "")
