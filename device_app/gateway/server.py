"""`stip-device serve`: the gateway as a process, from the command line to its end."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from device_app.assistant import DRAFTING, RETRY_SECONDS, Assistant
from device_app.bundle import Bundle
from device_app.connection import Address
from device_app.drafting import Drafting
from device_app.encoder import Encoder
from device_app.gateway.app import application
from device_app.gateway.guard import Hosts, api_key
from device_app.gateway.pool import OnFrame, Pool, WireEvent
from device_app.gateway.serving import Gateway, ServedModel
from device_app.history import History
from device_app.options import lost, read_token
from device_app.terminal import note
from shared.errors import UsageError
from shared.levels import limit
from shared.loopback import is_loopback
from shared.manifest import DEVICE_MANIFEST

SHUTDOWN_SECONDS = 5  # for answers that were cancelled to be told so


def command(arguments: argparse.Namespace) -> None:
    """Serves until it is told to stop."""
    logging.basicConfig(format="stip-device: %(message)s", level=logging.WARNING)
    key, fresh = api_key(arguments.api_key_file)
    address = Address(arguments.url, arguments.ca, arguments.insecure)
    token = read_token(arguments.token_file)
    bundles = [(folder, Bundle.open(folder)) for folder in arguments.folders]
    for _, bundle in bundles:
        if bundle.manifest.warning:
            note(f"stip-device: warning: {bundle.manifest.warning}")
    listener = listen(arguments.host, arguments.port)
    history = History.in_memory() if arguments.no_history else History.open()
    gateway = open_gateway(
        bundles,
        address,
        token=token,
        sessions=arguments.sessions,
        history=history,
        retry_seconds=arguments.retry_seconds,
        drafting=Drafting(arguments.draft_tokens, arguments.bytes_a_token),
    )
    port = listener.getsockname()[1]
    server = Server(gateway, hosts=Hosts(arguments.host, port), key=key)
    with listener:
        _greet(gateway, arguments.host, port, key if fresh else None)
        asyncio.run(server.serve([listener]))


def open_gateway(
    bundles: Sequence[tuple[Path, Bundle]],
    address: Address,
    *,
    token: str | None = None,
    sessions: int = 4,
    history: History,
    retry_seconds: float = RETRY_SECONDS,
    drafting: Drafting = DRAFTING,
) -> Gateway:
    """A gateway to these bundles (folder, bundle), each with up to `sessions` sessions in the cloud.

    Raises UsageError for a kind of model that no route serves, where two have the same name, and for less than one
    session.
    """
    if sessions < 1:
        raise UsageError(f"--sessions: seen {sessions}, wanted at least 1")
    models: dict[str, ServedModel] = {}
    gateway = Gateway(models, history)
    for folder, bundle in bundles:
        bundle.want_kind("serve", "decoder", "vision-decoder", "encoder")
        name = bundle.manifest.served_name
        if name in models:
            raise UsageError(f"{folder}: seen a second bundle named {name!r}, wanted each name once")
        created = int((folder / DEVICE_MANIFEST).stat().st_mtime)
        options: dict[str, Any] = {"token": token, "retry_seconds": retry_seconds, "on_lost": lost}
        sessions_of = _pool(bundle, address, sessions, gateway.observed, drafting, options)
        models[name] = ServedModel(name, bundle, created, sessions_of)
    return gateway


def _pool(
    bundle: Bundle,
    address: Address,
    sessions: int,
    observed: Callable[[WireEvent], None],
    drafting: Drafting,
    options: dict[str, Any],
) -> Pool[Any]:
    if bundle.manifest.kind == "encoder":

        def encoder(on_frame: OnFrame) -> Encoder:
            return Encoder(bundle, address, on_frame=on_frame, **options)

        return Pool(encoder, sessions=sessions, observed=observed)

    def assistant(on_frame: OnFrame) -> Assistant:
        return Assistant(bundle, address, on_frame=on_frame, drafting=drafting, **options)

    return Pool(assistant, sessions=sessions, shared=lambda one, ids: one.shared_prefix(ids), observed=observed)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UsageError where there can be none."""
    if not 0 <= port < 2**16:
        raise UsageError(f"--port: seen {port}, wanted 0 to 65535")
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(where[:2], family=family, backlog=128)
    except OSError as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"--host {host} --port {port}: {reason}", hint="is another gateway running?") from None


def _greet(gateway: Gateway, host: str, port: int, fresh_key: str | None) -> None:
    shown = f"[{host}]" if ":" in host else host
    if not is_loopback(host):
        note(
            f"stip-device: warning: {host} is beyond this machine, and prompts and the key cross the network in the "
            "clear"
        )
    for served in gateway.models.values():
        note(f"stip-device: serving {served.name}; {limit(served.bundle.manifest.scheme)}")
    note(f"stip-device: OpenAI-compatible API at http://{shown}:{port}/v1")
    if fresh_key is None:
        note(f"stip-device: page at http://{shown}:{port}/")
    else:
        note(f"stip-device: API key (made for this run): {fresh_key}")
        note(f"stip-device: page at http://{shown}:{port}/#key={fresh_key}")


class Server(uvicorn.Server):
    """uvicorn, which ends quietly: the first signal cancels all answers and ends their sessions, a second one ends
    the process."""

    def __init__(self, gateway: Gateway, *, hosts: Hosts, key: str) -> None:
        self._gateway = gateway
        config = uvicorn.Config(
            application(gateway, hosts=hosts, key=key),
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again once all is done, and the exit status would not be 0."""
        loop = asyncio.get_running_loop()
        numbers: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)
        try:
            for number in numbers:
                loop.add_signal_handler(number, self.stop)
        except (RuntimeError, ValueError, NotImplementedError):  # not in the main thread: somebody else stops it
            numbers = ()
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Ends the gateway soon; told twice, without waiting for anything."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Cancels all answers, so that their readers are told, before it waits for them."""
        self._gateway.cancel_all()
        await super().shutdown(sockets)
