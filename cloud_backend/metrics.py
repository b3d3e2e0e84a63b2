"""What the server counts, for Prometheus. Numbers, served models and error codes; no token, no name, no content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from cloud_backend.engine import Engine
from cloud_backend.kv_cache import PagePool
from cloud_backend.session import Context

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SESSIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, of when it was made


class Metrics:
    """The metrics of one server. Each method is one event; what can be read off the server is read at each scrape.

    sessions_open, sessions_held: give the sessions of a served model, open or kept for a device to come back.
    requests_waiting: gives the requests not begun.
    """

    def __init__(self) -> None:
        self.sessions_open: Callable[[str], int] = lambda model: 0
        self.sessions_held: Callable[[str], int] = lambda model: 0
        self.requests_waiting: Callable[[], int] = lambda: 0
        self._contexts: list[Context] = []
        self._models: dict[Engine, str] = {}
        registry = self._registry = CollectorRegistry()
        registry.register(_Live(self._now))
        ProcessCollector(registry=registry)
        model = ["model"]

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(name, text, model, registry=registry, buckets=tuple(buckets))

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self._step_sessions = histogram("stip_step_sessions", "Sessions in one step of an engine.", SESSIONS)
        self._step_rows = histogram("stip_step_rows", "Rows computed in one step of an engine.", ROWS)
        self._step_seconds = histogram("stip_step_seconds", "Time of one step of an engine.", SECONDS)
        self._first_token = histogram(
            "stip_first_token_seconds", "From the arrival of a prompt's first request to its first rows.", SECONDS
        )
        self._token = histogram(
            "stip_token_seconds", "From the arrival of a request for next tokens to its rows.", SECONDS
        )
        self._requests = counter("stip_requests", "Requests that an engine answered.", model)
        self._positions = counter("stip_positions", "Positions computed for requests that succeeded.", model)
        self._evictions = counter("stip_evictions", "KV caches given up for others.", model)
        self._replays = counter(
            "stip_replays", "Requests told that nothing is held, so that the device replays.", model
        )
        self._errors = counter("stip_errors", "Errors sent, by code.", ["model", "code"])
        self._received = counter("stip_received_bytes", "Bytes of frames received.")
        self._sent = counter("stip_sent_bytes", "Bytes of frames sent.")
        self._refused = counter("stip_tokens_refused", "Opens without a token that is known.")

    def serve(self, contexts: Iterable[Context]) -> None:
        """These contexts are served from now on; their series start at 0."""
        self._contexts += contexts
        self._models = {context.engine: context.served_name for context in self._contexts}
        for model in self._models.values():
            for metric in (self._step_sessions, self._first_token, self._token, self._step_rows, self._step_seconds):
                metric.labels(model)
            for total in (self._requests, self._positions, self._evictions, self._replays):
                total.labels(model)

    def step(self, engine: Engine, sessions: int, rows: int, seconds: float) -> None:
        """An engine ran one step for so many sessions, of so many rows."""
        if model := self._models.get(engine):  # not while it is only tried out
            self._step_sessions.labels(model).observe(sessions)
            self._step_rows.labels(model).observe(rows)
            self._step_seconds.labels(model).observe(seconds)

    def evicted(self, engine: Engine) -> None:
        """An engine gave up the KV cache of a session."""
        if model := self._models.get(engine):
            self._evictions.labels(model).inc()

    def answered(self, model: str, positions: int) -> None:
        """An engine answered a request; positions: computed for it, 0 where it failed."""
        self._requests.labels(model).inc()
        self._positions.labels(model).inc(positions)

    def first_token(self, model: str, seconds: float) -> None:
        """A prompt got its first rows, so long after its first request arrived."""
        self._first_token.labels(model).observe(seconds)

    def token(self, model: str, seconds: float) -> None:
        """A request behind a prompt got its rows, so long after it arrived. Drafts that it checks count as one."""
        self._token.labels(model).observe(seconds)

    def error(self, model: str, code: str, kv_length: int) -> None:
        """An Error was sent; model: "" before a session is open."""
        self._errors.labels(model, code).inc()
        if code == "out_of_step" and kv_length == 0:
            self._replays.labels(model).inc()
        if code == "unauthorized" and not model:
            self._refused.inc()

    def received(self, size: int) -> None:
        """A frame of so many bytes came."""
        self._received.inc(size)

    def sent(self, size: int) -> None:
        """A frame of so many bytes went."""
        self._sent.inc(size)

    def page(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _now(self) -> Iterator[Metric]:
        models = sorted(set(self._models.values()))

        def gauge(name: str, text: str, value: Callable[[str], float]) -> Metric:
            family = GaugeMetricFamily(name, text, labels=["model"])
            for model in models:
                family.add_metric([model], value(model))
            return family

        def of_pools(read: Callable[[PagePool], int]) -> Callable[[str], float]:
            return lambda model: sum(
                read(engine.pool) for engine, name in self._models.items() if name == model and engine.pool
            )

        yield gauge("stip_sessions_open", "Sessions with a connection.", self.sessions_open)
        yield gauge("stip_sessions_held", "Sessions kept for a device to come back.", self.sessions_held)
        yield gauge("stip_kv_used_bytes", "Memory that KV caches take.", of_pools(lambda pool: pool.used))
        yield gauge("stip_kv_budget_bytes", "Memory that KV caches may take.", of_pools(lambda pool: pool.budget))
        yield GaugeMetricFamily("stip_requests_waiting", "Requests not begun.", value=self.requests_waiting())


class _Live(Collector):
    """Values that are read when they are asked for."""

    def __init__(self, read: Callable[[], Iterator[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        return self._read()
