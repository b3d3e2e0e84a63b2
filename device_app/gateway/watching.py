"""Which witness sees which session: the wire's events, brought to those who want to know."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from device_app.gateway.pool import WireEvent
from device_app.gateway.serving import Gateway, ServedModel
from device_app.gateway.witness import LookUp, Witness


class Watch:
    """Keeps a witness for each session as long as it has seen every frame of it."""

    def __init__(self, gateway: Gateway) -> None:
        self._look_ups: dict[str, LookUp] = {}
        self._witnesses: dict[int, Witness] = {}
        self._watched: set[int] = set()
        self._lock = threading.Lock()
        gateway.observers.append(self._see)

    @contextmanager
    def over(self, served: ServedModel, number: int) -> Iterator[Witness]:
        """The witness of a session, for one question."""
        with self._lock:
            look_up = self._look_ups.setdefault(served.name, LookUp(served.bundle))
            witness = self._witnesses.setdefault(number, Witness(served.bundle, look_up))
            self._watched.add(number)
        witness.forget()
        try:
            yield witness
        finally:
            with self._lock:
                self._watched.discard(number)

    def _see(self, event: WireEvent) -> None:
        with self._lock:
            number = event.assistant_number
            if number in self._watched:
                self._witnesses[number].see(event.way, event.frame, event.at)
            else:  # somebody else's question, after which the witness no longer knows what the cloud holds
                self._witnesses.pop(number, None)
