"""The web page's own API: chats, their settings, and answers as a stream of events. Everything needs the key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from device_app.gateway.errors import ApiError, json_response
from device_app.gateway.openai_types import read
from device_app.gateway.page_answer import PageAnswer, Settings
from device_app.gateway.page_chats import Chats
from device_app.gateway.page_images import MOST_IMAGES, image_urls, with_files
from device_app.gateway.page_lines import Lines
from device_app.gateway.serving import Gateway, ServedModel
from device_app.gateway.watching import Watch
from device_app.history import Chat, StoredMessage, text_of
from device_app.markdown import render
from shared.errors import HistoryError
from shared.levels import limit

MOST_TITLE = 200  # characters

Kept = Annotated[int, msgspec.Meta(ge=0)]


class NewChat(msgspec.Struct):
    """`POST /api/chats`. model: the only one, or the first, where it is left out."""

    model: str | None = None
    settings: Settings | None = None


class Change(msgspec.Struct):
    """`PATCH /api/chats/{id}`."""

    title: Annotated[str, msgspec.Meta(max_length=MOST_TITLE)] | None = None
    settings: Settings | None = None


class Ask(msgspec.Struct):
    """`POST /api/chats/{id}/answer`: cut the chat to `keep` messages, add a question, answer the last one.

    Without text and images the last message that is kept is answered again.
    """

    text: str = ""
    images: Annotated[list[str], msgspec.Meta(max_length=MOST_IMAGES)] = []
    keep: Kept | None = None


class PageApi:
    """What the handlers share: the gateway, and the answers that are being made."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._chats = Chats(gateway.history)
        self._lines = Lines(self._chats)
        self._watch = Watch(gateway)
        self._running: dict[str, PageAnswer] = {}

    async def info(self, request: Request) -> Response:
        """What is served, and what holds for it."""
        models = [_model(served) for served in self._gateway.models.values() if _chats(served)]
        return json_response({"models": models, "history_kept": self._gateway.history.kept})

    async def chats(self, request: Request) -> Response:
        """The list, searched."""
        found = await asyncio.to_thread(self._chats.search, request.query_params.get("search", ""))
        return json_response([_chat(chat) for chat in found])

    async def new(self, request: Request) -> Response:
        """An empty chat."""
        wanted = await read(request, NewChat)
        names = [served.name for served in self._gateway.models.values() if _chats(served)]
        if not names:
            raise ApiError(404, "model: none that is served can chat", param="model", code="model_not_found")
        served = self._gateway.model(wanted.model or names[0])
        settings = msgspec.to_builtins(wanted.settings or Settings())
        chat = await asyncio.to_thread(lambda: self._chats.new(model=served.name, settings=settings))
        return json_response(_chat(chat), status=201)

    async def delete_all(self, request: Request) -> Response:
        """Forgets everything."""
        for running in list(self._running.values()):
            await running.stop()
        await asyncio.to_thread(self._chats.delete_all)
        self._lines.forget(None)
        return Response(status_code=204)

    async def chat(self, request: Request) -> Response:
        """One chat with its messages, answers as HTML."""
        chat = await self._found(request)
        messages = await self._lines.of(chat.id)
        shown = await asyncio.to_thread(lambda: [_message(message) for message in messages])
        return json_response(_chat(chat) | {"messages": shown})

    async def change(self, request: Request) -> Response:
        """Another title, other settings."""
        chat, wanted = await self._found(request), await read(request, Change)
        settings = None if wanted.settings is None else msgspec.to_builtins(wanted.settings)
        history = self._chats.of(chat.id)
        changed = await asyncio.to_thread(lambda: history.change(chat.id, title=wanted.title, settings=settings))
        return json_response(_chat(changed))

    async def delete(self, request: Request) -> Response:
        """Forgets one chat."""
        chat = await self._found(request)
        if (running := self._running.get(chat.id)) is not None:
            await running.stop()
        await asyncio.to_thread(self._chats.of(chat.id).delete, chat.id)
        self._lines.forget(chat.id)
        return Response(status_code=204)

    async def export(self, request: Request) -> Response:
        """One chat as JSON, to keep elsewhere."""
        chat = await self._found(request)
        content = {**vars(chat), "messages": [vars(message) for message in await self._lines.of(chat.id)]}
        text = json.dumps(content, ensure_ascii=False, indent=2)
        return Response(text.encode("utf-8", "replace"), media_type="application/json")

    async def answer(self, request: Request) -> Response:
        """Answers, as server-sent events. Who leaves stops the answer; what there was of it is kept."""
        chat, wanted = await self._found(request), await read(request, Ask)
        served = self._gateway.model(chat.model)
        if chat.id in self._running:
            raise ApiError(409, "chat: seen a question while an answer is being made, wanted one at a time")
        if wanted.images and served.bundle.manifest.image is None:
            raise ApiError(400, f"images: seen {len(wanted.images)}, wanted none, as {served.name} takes none")
        asked = _question(wanted)
        if asked is not None:
            with_files(asked)  # which refuses what is no image, before it is kept
        answer = PageAnswer(self._lines, served, chat, self._watch)
        self._running[chat.id] = answer
        try:
            await answer.prepare(asked, wanted.keep)
        except BaseException:
            del self._running[chat.id]
            raise
        answer.start(lambda: self._running.pop(chat.id, None))
        return StreamingResponse(answer.events(), media_type="text/event-stream")

    async def stop(self, request: Request) -> Response:
        """Stops the answer that is being made, if any; done once it has stopped."""
        if (running := self._running.get(request.path_params["id"])) is not None:
            await running.stop()
        return Response(status_code=204)

    async def _found(self, request: Request) -> Chat:
        try:
            chat_id = request.path_params["id"]
            return await asyncio.to_thread(self._chats.of(chat_id).chat, chat_id)
        except HistoryError as error:
            if str(error).startswith("chat"):
                raise ApiError(404, str(error), code="chat_not_found") from None
            raise


def routes(gateway: Gateway) -> list[Route]:
    """The page's API."""
    api = PageApi(gateway)
    table: list[tuple[str, Literal["GET", "POST", "PATCH", "DELETE"], Callable[[Request], Any]]] = [
        ("/api/info", "GET", api.info),
        ("/api/chats", "GET", api.chats),
        ("/api/chats", "POST", api.new),
        ("/api/chats", "DELETE", api.delete_all),
        ("/api/chats/{id}", "GET", api.chat),
        ("/api/chats/{id}", "PATCH", api.change),
        ("/api/chats/{id}", "DELETE", api.delete),
        ("/api/chats/{id}/export", "GET", api.export),
        ("/api/chats/{id}/answer", "POST", api.answer),
        ("/api/chats/{id}/stop", "POST", api.stop),
    ]
    return [Route(path, handler, methods=[method]) for path, method, handler in table]


def _question(wanted: Ask) -> str | list[dict[str, Any]] | None:
    """A message's content, as it is kept; None where the last one is to be answered again."""
    if not wanted.images:
        return wanted.text if wanted.text.strip() else None
    pictures: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in wanted.images]
    return [*pictures, {"type": "text", "text": wanted.text}] if wanted.text.strip() else pictures


def _chats(served: ServedModel) -> bool:
    return served.bundle.template is not None and served.bundle.manifest.kind in ("decoder", "vision-decoder")


def _model(served: ServedModel) -> dict[str, Any]:
    manifest = served.bundle.manifest
    return {
        "name": served.name,
        "kind": manifest.kind,
        "scheme": manifest.scheme,
        "head": manifest.head,
        "limit": limit(manifest.scheme),
        "context": manifest.context,
        "width": manifest.hidden_size,
        "vocabulary": manifest.vocab_size,
        "images": manifest.image is not None,
        "warning": manifest.warning,
    }


def _chat(chat: Chat) -> dict[str, Any]:
    return {
        "id": chat.id,
        "title": chat.title,
        "model": chat.model,
        "settings": chat.settings,
        "changed": chat.changed,
    }


def _message(message: StoredMessage) -> dict[str, Any]:
    text = text_of(message.content)
    shown: dict[str, Any] = {"role": message.role, "text": text, "details": message.details}
    if message.role == "assistant":
        return shown | {"blocks": render(text)}
    return shown | {"images": image_urls(message.content)}
