"""A gateway in front of the tiny llama, which says nothing that makes sense, quickly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.conftest import RunningCloud, run_cloud
from tests.device_app.gateway.asking import client_of
from tests.device_app.gateway.gateways import RunningGateway, run_gateway


@pytest.fixture(scope="session")
def tiny_cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


@pytest.fixture(scope="session")
def tiny_gateway(tiny: Path, tiny_cloud: RunningCloud) -> Iterator[RunningGateway]:
    with run_gateway(tiny, cloud=tiny_cloud.url) as running:
        yield running


@pytest.fixture(scope="session")
def client(tiny_gateway: RunningGateway) -> Iterator[OpenAI]:
    """Of a tiny model, which says nothing that makes sense, quickly."""
    with client_of(tiny_gateway) as one:
        yield one
