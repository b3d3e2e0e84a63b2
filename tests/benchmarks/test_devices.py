"""What a device of a load says the cloud did to it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from benchmarks.devices import Device, Recoveries
from cloud_backend.kv_cache import KVCache
from device_app.bundle import Bundle
from device_app.connection import Address
from tests.conftest import run_cloud


def test_an_evicted_device_counts_its_eviction_and_makes_all_its_tokens(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_cloud(tiny) as cloud:
        caches: list[KVCache] = []
        new_cache = cloud.engine.new_cache

        def noted() -> KVCache:
            caches.append(new_cache())
            return caches[-1]

        monkeypatch.setattr(cloud.engine, "new_cache", noted)
        device = Device(Bundle.open(tiny / "device"), Address(cloud.url), 0)
        device.warm_up()
        assert device.recoveries == Recoveries()
        caches[0].cut(0)  # as if others had needed the room
        timeline = device.answer("Hello!", 5, threading.Event(), threading.Event())
        assert len(timeline.moments) == 5
        assert device.recoveries == Recoveries(evictions=1, replays=1)
        device.forget()
        device.warm_up()
        assert device.recoveries == Recoveries(evictions=1, replays=1)
