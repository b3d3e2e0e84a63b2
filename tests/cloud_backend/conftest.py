"""One thread for each tiny model: more would only wait for each other, and for whatever else the machine does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):  # of server processes
        yield
    torch.set_num_threads(before)
