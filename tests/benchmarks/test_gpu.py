"""`make bench-gpu` where there is no GPU: the same path over tiny models, a real cloud and real devices."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import pytest
import torch

from benchmarks.card import Card
from benchmarks.gpu import main, same

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The figures of a tiny run, and what it printed."""
    path = tmp_path_factory.mktemp("results") / "gpu.json"
    with redirect_stdout(StringIO()) as printed:
        main(["--device", "cpu", "--tiny", "--out", str(path)])
    return json.loads(path.read_text()), printed.getvalue()


def test_devices_over_loopback_get_the_tokens_of_the_unprotected_model(ran: tuple[dict[str, Any], str]) -> None:
    llama = ran[0]["llama"]
    for measured in (llama["single"], llama["together"]):
        assert measured["same_tokens"] == measured["all_tokens"] > 0


def test_every_column_has_a_time(ran: tuple[dict[str, Any], str]) -> None:
    single, together = ran[0]["llama"]["single"], ran[0]["llama"]["together"]
    assert set(single["ms_per_token"]) == {"s", "u", "t", "w"} and min(single["ms_per_token"].values()) > 0
    assert set(together["tokens_per_second"]) == {"s", "u"} and min(together["tokens_per_second"].values()) > 0
    assert 0 < together["busiest_process"] <= together["devices"]
    assert min(ran[0]["gpt2"]["tokens_per_second"].values()) > 0


def test_the_table_names_the_machine_and_the_paper(ran: tuple[dict[str, Any], str]) -> None:
    assert ran[0]["machine"]["card"] in ran[1]
    assert "45,366" in ran[1]


@without_gpu
def test_without_a_gpu_it_says_so_and_what_to_do() -> None:
    with pytest.raises(SystemExit, match=r"no CUDA device\nhint: .*--device cpu --tiny"):
        main([])


def test_real_shapes_are_refused_on_a_processor() -> None:
    with pytest.raises(SystemExit, match="hint: add --tiny"):
        main(["--device", "cpu"])


def test_tokens_count_as_the_same_up_to_the_first_other_one() -> None:
    assert same([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5, 6]]) == 1 + 3


def test_a_file_of_figures_is_named_after_the_card() -> None:
    assert Card("cpu", "NVIDIA H200 (SXM, 141 GB)").slug == "nvidia-h200-sxm-141-gb"
