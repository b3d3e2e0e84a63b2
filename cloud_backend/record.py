"""What is counted of one connection: for the metrics at once, and for the log when it ends."""

from __future__ import annotations

import logging
import time
from collections import Counter

from cloud_backend.engine import AppendWork, Engine, Result, Work
from cloud_backend.metrics import Metrics
from shared.errors import RequestError

log = logging.getLogger("stip.cloud")


def positions(engine: Engine, work: Work) -> int:
    """The positions that a request computes."""
    image = isinstance(work, AppendWork) and work.kind == "image"
    return engine.image_tokens if image else len(work.embeddings)


class Record:
    """Counts of one connection. Times are perf_counter()'s."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = time.perf_counter()
        self._model = ""  # until a session is open
        self._session = ""
        self._requests = 0
        self._positions = 0
        self._errors: Counter[str] = Counter()
        self._prompt_since: float | None = None  # when the prompt arrived that has no rows yet

    def received(self, size: int) -> None:
        """A frame of so many bytes came."""
        self._metrics.received(size)

    def sent(self, size: int) -> None:
        """A frame of so many bytes went."""
        self._metrics.sent(size)

    def opened(self, model: str, session: str) -> None:
        """A session on a served model was opened; session: its public id."""
        self._model, self._session = model, session
        fields = {"event": "session opened", "session": session, "model": model}
        log.info("session opened on %s", model, extra={"fields": fields})

    def answered(self, engine: Engine, work: Work, arrived: float, result: Result | RequestError) -> None:
        """The engine is done with a request that arrived then."""
        failed = isinstance(result, RequestError)
        computed = 0 if failed else positions(engine, work)
        self._requests += 1
        self._positions += computed
        self._metrics.answered(self._model, computed)
        if failed:
            self._prompt_since = None
        elif isinstance(work, AppendWork):
            self._rows(work, arrived)
        elif work.want == "store":  # the prompt of a translation
            self._prompt_since = arrived

    def _rows(self, work: AppendWork, arrived: float) -> None:
        """Tells the first token of a prompt from those behind it: only a prompt has positions of which no rows are
        wanted, or begins at 0; and it ends with the first rows."""
        now = time.perf_counter()
        if self._prompt_since is None and (work.keep == 0 or work.rows < len(work.embeddings)):
            self._prompt_since = arrived
        if work.rows == 0:
            return
        if self._prompt_since is None:
            self._metrics.token(self._model, now - arrived)
        else:
            self._metrics.first_token(self._model, now - self._prompt_since)
            self._prompt_since = None

    def error(self, code: str, kv_length: int) -> None:
        """An Error is sent."""
        self._errors[code] += 1
        self._metrics.error(self._model, code, kv_length)

    def closed(self, still_open: int) -> None:
        """The connection is over; so many others are open."""
        fields = {
            "event": "session closed",
            "session": self._session,
            "model": self._model,
            "seconds": round(time.perf_counter() - self._began, 3),
            "requests": self._requests,
            "positions": self._positions,
            "errors": dict(self._errors),
            "open": still_open,
        }
        log.info("session closed, %d open", still_open, extra={"fields": fields})
