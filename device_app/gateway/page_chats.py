"""The page's chats: in the history, or in memory alone where the disk refuses a new one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from device_app.history import Chat, History
from shared.errors import HistoryError


class Chats:
    """All chats. Blocking, and safe for threads, as the history is."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._passing = History.in_memory()
        self._refused: dict[str, HistoryError] = {}  # by chat that is in memory alone: why

    def new(self, *, model: str, settings: Mapping[str, Any]) -> Chat:
        """Begins a chat, wherever there is room."""
        try:
            return self._history.new(model=model, settings=settings)
        except HistoryError as error:
            chat = self._passing.new(model=model, settings=settings)
            self._refused[chat.id] = error
            return chat

    def of(self, chat_id: str) -> History:
        """Where a chat is."""
        return self._passing if chat_id in self._refused else self._history

    def refusal(self, chat_id: str) -> HistoryError | None:
        """Why a chat is in memory alone, if it is."""
        return self._refused.get(chat_id)

    def search(self, text: str) -> list[Chat]:
        """Newest first. Raises HistoryError."""
        found = [*self._history.chats(text), *self._passing.chats(text)]
        return sorted(found, key=lambda chat: chat.changed, reverse=True)

    def delete_all(self) -> None:
        """Forgets everything. Raises HistoryError."""
        self._history.delete_all()
        self._passing.delete_all()
        self._refused.clear()
