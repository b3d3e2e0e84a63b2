"""What a scrape says after requests whose counts are known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cloud_backend.limits import Limits
from cloud_backend.listener import listening
from cloud_backend.server import CloudServer
from cloud_backend.tokens import Tokens, add_token
from shared import wire
from shared.errors import UsageError
from tests.cloud_backend.asking import eventually, exchange, get, samples
from tests.cloud_backend.device import Device, close_code, dial, encode, open_of, table
from tests.cloud_backend.faults import failing
from tests.conftest import RunningCloud, run_cloud

ON_BOTH_ENGINES = True
EMBEDDINGS = table()


@pytest.fixture
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


def test_the_series_of_a_served_model_are_there_before_its_first_session(cloud: RunningCloud) -> None:
    seen = samples(cloud.url)
    for name in ("sessions_open", "sessions_held", "kv_used_bytes", "kv_budget_bytes", "replays_total"):
        assert (f"stip_{name}", "llama") in seen
    for name in ("step_sessions", "step_rows", "step_seconds", "first_token_seconds", "token_seconds"):
        assert seen[f"stip_{name}_count", "llama"] == 0
    assert seen["stip_evictions_total", "llama"] == seen["stip_requests_waiting",] == 0


def test_a_scrape_is_in_prometheus_text_format(cloud: RunningCloud) -> None:
    response, body = exchange(cloud.url, "/metrics")
    assert response.headers.get_all("Content-Type") == ["text/plain; version=0.0.4; charset=utf-8"]
    assert "# TYPE stip_token_seconds histogram" in body
    assert "_created" not in body


def test_two_servers_in_a_process_count_for_themselves(tiny: Path, cloud: RunningCloud) -> None:
    with run_cloud(tiny) as other, Device(other.url, open_of(tiny)) as device:
        device.rows(0, EMBEDDINGS[:3])
        assert samples(other.url)["stip_requests_total", "llama"] == 1
        assert samples(cloud.url)["stip_requests_total", "llama"] == 0


def test_an_open_session_counts_until_it_ends(cloud: RunningCloud, tiny: Path) -> None:
    with dial(cloud.url), Device(cloud.url, open_of(tiny)):
        assert samples(cloud.url)["stip_sessions_open", "llama"] == 1
    assert eventually(lambda: samples(cloud.url)["stip_sessions_open", "llama"] == 0)


def test_sessions_count_for_their_model(tiny: Path, tiny_exports: Callable[[str], Path]) -> None:
    with run_cloud(tiny, tiny_exports("qwen2")) as running, Device(running.url, open_of(tiny)) as device:
        device.rows(0, EMBEDDINGS[:3])
        seen = samples(running.url)
    assert [seen["stip_sessions_open", model] for model in ("llama", "qwen2")] == [1, 0]
    assert [seen["stip_positions_total", model] for model in ("llama", "qwen2")] == [3, 0]


def test_a_prompt_in_pieces_has_one_first_token_and_each_step_behind_it_one_time(
    cloud: RunningCloud, tiny: Path
) -> None:
    with Device(cloud.url, open_of(tiny)) as device:
        device.send(device.append(0, EMBEDDINGS[:20], rows=0))
        device.send(device.append(20, EMBEDDINGS[20:41], top_k=1, after=1))
        for _ in range(2):
            assert isinstance(device.receive(), wire.Logits)
        for keep in range(41, 46):
            device.rows(keep, EMBEDDINGS[keep : keep + 1], top_k=1)
        device.rows(46, EMBEDDINGS[:4], rows=4, top_k=1)  # a token and three drafts
        device.rows(48, EMBEDDINGS[:9], top_k=1)  # the next turn
    seen = samples(cloud.url)
    assert seen["stip_first_token_seconds_count", "llama"] == 2
    assert seen["stip_token_seconds_count", "llama"] == 6
    assert seen["stip_positions_total", "llama"] == seen["stip_step_rows_sum", "llama"] == 41 + 5 + 4 + 9
    assert seen["stip_requests_total", "llama"] == 9


def test_the_first_token_is_counted_from_the_first_piece_of_its_prompt(cloud: RunningCloud, tiny: Path) -> None:
    with Device(cloud.url, open_of(tiny)) as device:
        device.send(device.append(0, EMBEDDINGS[:200], rows=0))
        device.send(device.append(200, EMBEDDINGS[:1], top_k=1, after=1))
        first, second = device.receive(), device.receive()
    computed = (first.compute_us + second.compute_us) / 1e6
    assert samples(cloud.url)["stip_first_token_seconds_sum", "llama"] >= computed


def test_a_prompt_of_one_position_has_a_first_token(cloud: RunningCloud, tiny: Path) -> None:
    with Device(cloud.url, open_of(tiny)) as device:
        device.rows(0, EMBEDDINGS[:1])
    assert samples(cloud.url)["stip_first_token_seconds_count", "llama"] == 1


def test_a_prompt_that_fails_gives_no_first_token(cloud: RunningCloud, tiny: Path) -> None:
    with Device(cloud.url, open_of(tiny)) as device:
        device.rows(0, EMBEDDINGS[:2], rows=0)
        with failing(cloud.engine):
            assert device.ask(device.append(2, EMBEDDINGS[:3])).code == "internal"
        device.rows(2, EMBEDDINGS[:1])
    seen = samples(cloud.url)
    assert seen["stip_first_token_seconds_count", "llama"] == 0
    assert (seen["stip_positions_total", "llama"], seen["stip_requests_total", "llama"]) == (3, 3)


def test_the_prompt_of_a_translation_begins_with_its_source(tiny_exports: Callable[[str], Path]) -> None:
    export = tiny_exports("marian")
    with run_cloud(export) as running, Device(running.url, open_of(export)) as device:
        rows = np.random.default_rng(0).normal(size=(7, device.opened.encoder_size)).astype(np.float32)
        stored = encode(device, [rows], "store")
        step = device.ask(device.append(0, rows[:1, : device.opened.hidden_size]))
        device.ask(device.append(1, rows[:1, : device.opened.hidden_size]))
        seen = samples(running.url)
    assert (seen["stip_first_token_seconds_count", "marian"], seen["stip_token_seconds_count", "marian"]) == (1, 1)
    computed = (stored.compute_us + step.compute_us) / 1e6
    assert seen["stip_first_token_seconds_sum", "marian"] >= computed


def test_errors_count_by_code_and_replays_where_nothing_is_held(cloud: RunningCloud, tiny: Path) -> None:
    with Device(cloud.url, open_of(tiny)) as device:
        assert device.ask(device.append(5, EMBEDDINGS[:1])).code == "out_of_step"  # nothing is held: a replay
        device.rows(0, EMBEDDINGS[:3])
        assert device.ask(device.append(9, EMBEDDINGS[:1])).code == "out_of_step"  # a device's mistake
        assert device.ask(device.append(0, EMBEDDINGS[:, :7])).code == "bad_request"
    seen = samples(cloud.url)
    assert seen["stip_errors_total", "out_of_step", "llama"] == 2
    assert seen["stip_errors_total", "bad_request", "llama"] == 1
    assert seen["stip_replays_total", "llama"] == 1


def test_bytes_are_those_of_the_frames(cloud: RunningCloud, tiny: Path) -> None:
    sent, received = [wire.encode(open_of(tiny))], []
    with Device(cloud.url, open_of(tiny)) as device:
        sent.append(wire.encode(device.append(0, EMBEDDINGS[:3])))
        device.socket.send(sent[-1])
        frame = device.socket.recv()
        assert isinstance(frame, bytes)
        received += [wire.encode(device.opened), frame]
    seen = samples(cloud.url)
    assert seen["stip_received_bytes_total",] == sum(map(len, sent))
    assert seen["stip_sent_bytes_total",] == sum(map(len, received))


def test_refused_tokens_count(tiny: Path, tmp_path: Path) -> None:
    add_token(tmp_path / "tokens.txt", "phone")
    with run_cloud(tiny, tokens=Tokens(tmp_path / "tokens.txt")) as running:
        for token in (None, "stip_wrong"):
            with dial(running.url) as connection:
                connection.send(wire.encode(open_of(tiny, token=token)))
                assert close_code(connection) == 1008
        seen = samples(running.url)
    assert seen["stip_tokens_refused_total",] == seen["stip_errors_total", "unauthorized", ""] == 2


def test_a_server_full_counts_whom_it_sends_away(tiny: Path) -> None:
    with run_cloud(tiny, limits=Limits(max_sessions=1)) as running, Device(running.url, open_of(tiny)):
        with dial(running.url) as second:
            close_code(second)
        assert samples(running.url)["stip_errors_total", "too_many_sessions", ""] == 1


def test_sessions_held_are_what_the_server_says(cloud: RunningCloud) -> None:
    cloud.server.metrics.sessions_held = lambda model: {"llama": 3}[model]
    assert samples(cloud.url)["stip_sessions_held", "llama"] == 3


def test_evictions_count_for_the_model_of_their_engine(cloud: RunningCloud) -> None:
    cloud.server._scheduler.on_evict(cloud.engine)
    assert samples(cloud.url)["stip_evictions_total", "llama"] == 1


# --- where they are shown ---


def metrics_url(log: list[str]) -> str:
    return next(line for line in log if "metrics on" in line).split()[-1]


def test_beyond_loopback_metrics_are_shown_on_their_own_port_alone(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "stip.cloud")
    add_token(tmp_path / "tokens.txt", "phone")

    async def ask() -> None:
        server = CloudServer([], Limits(), Tokens(tmp_path / "tokens.txt"))
        async with listening(server, "0.0.0.0", 0, metrics_at=("127.0.0.1", 0)) as listener:
            main = f"ws://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            other = metrics_url(caplog.messages)
            statuses = [
                (await asyncio.to_thread(get, url, path))[0]
                for url in (main, other)
                for path in ("/healthz", "/readyz", "/metrics", "/other")
            ]
            assert statuses == [200, 200, 404, 404, 200, 200, 200, 404]
            status, _ = await asyncio.to_thread(get, other, "/metrics", Host="evil.example")
            assert status == 403
            websocket = {"Upgrade": "websocket", "Connection": "Upgrade"}
            assert (await asyncio.to_thread(get, other, "/", **websocket))[0] == 404

    asyncio.run(ask())


def test_a_metrics_port_in_use_names_its_option(cloud: RunningCloud) -> None:
    async def listen(taken: int) -> None:
        async with listening(CloudServer([], Limits(), None), "127.0.0.1", 0, metrics_at=("127.0.0.1", taken)):
            pass

    with pytest.raises(UsageError, match="in use") as caught:
        asyncio.run(listen(int(cloud.url.rsplit(":", 1)[1])))
    assert "--metrics-port" in (caught.value.hint or "")
