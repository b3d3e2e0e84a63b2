"""What the gateway serves: models by name, the conversations that are kept, and who watches the wire."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from device_app.bundle import Bundle
from device_app.gateway.errors import ApiError
from device_app.gateway.pool import Pool, WireEvent
from device_app.history import History


@dataclass(frozen=True)
class ServedModel:
    """One bundle under its served name, and the sessions that answer for it."""

    name: str
    bundle: Bundle
    created: int  # Unix time of the export
    pool: Pool[Any]

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: what the answers' numbers depend on, and nothing of the key."""
        manifest = self.bundle.manifest
        return f"stip-{manifest.scheme}-{manifest.head}-{manifest.dtype}"


@dataclass(frozen=True)
class Gateway:
    """Everything that requests share.

    observers: called in the sessions' threads with each frame as it travels; they must be quick.
    """

    models: Mapping[str, ServedModel]
    history: History
    observers: list[Callable[[WireEvent], None]] = field(default_factory=list)

    def model(self, name: str) -> ServedModel:
        """Raises ApiError (404) for a name that is not served."""
        try:
            return self.models[name]
        except KeyError:
            served = ", ".join(self.models)
            raise ApiError(
                404, f"model: seen {name[:100]!r}, wanted one of {served}", param="model", code="model_not_found"
            ) from None

    def observed(self, event: WireEvent) -> None:
        """Tells all observers."""
        for observer in tuple(self.observers):
            observer(event)

    def cancel_all(self) -> None:
        """Ends all answers that are being made: the gateway is stopping."""
        for served in self.models.values():
            served.pool.stop()

    def close(self) -> None:
        """Ends the sessions in the cloud and closes the history. Blocks until the last thread is done."""
        for served in self.models.values():
            served.pool.close()
        self.history.close()
