"""Who may ask the gateway: raw requests on a real socket."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device_app.gateway.guard import Hosts, api_key
from shared.errors import UsageError
from tests.device_app.gateway.gateways import KEY, RunningGateway, run_gateway


@pytest.fixture(scope="module")
def gateway(tiny_exports: Callable[..., Path]) -> Iterator[RunningGateway]:
    with run_gateway(tiny_exports("llama")) as running:
        yield running


def refused(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    """Status and code of an error in OpenAI's shape."""
    status, headers, body = answer
    assert headers["content-type"] == "application/json"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return status, error["code"]


def test_the_key_opens_the_api(gateway: RunningGateway) -> None:
    status, headers, body = gateway.ask("/v1/models")
    assert status == 200 and json.loads(body)["data"][0]["id"] == "llama"
    assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "authorization",
    ["", f"Basic {KEY}", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, "Bearer \xff\xfe"],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/api/chats", "/v1/no-such-page"])
def test_no_key_or_a_wrong_one_is_401(path: str, authorization: str, gateway: RunningGateway) -> None:
    answer = gateway.ask(path, headers={"Authorization": authorization})
    assert refused(answer) == (401, "invalid_api_key")
    assert answer[1]["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("host", ["localhost:{}", "127.0.0.1:{}", "[::1]:{}", "LOCALHOST:{}"])
def test_loopback_names_are_this_gateway(host: str, gateway: RunningGateway) -> None:
    assert gateway.ask("/v1/models", headers={"Host": host.format(gateway.port)})[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example:{}",
        "127.0.0.1",
        "127.0.0.1:1",
        "localhost.evil.example:{}",
        "127.0.0.1:{}@evil.example",
        "0.0.0.0:{}",
        "[::1]:{}x",
        "192.168.1.5:{}",
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/"])
def test_dns_rebinding_is_refused_by_host(path: str, host: str, gateway: RunningGateway) -> None:
    # The key goes with it: a page that has learnt it is refused all the same.
    answer = gateway.ask(path, headers={"Host": host.format(gateway.port)})
    if host:
        assert refused(answer) == (403, "wrong_host")
    else:
        assert answer[0] == 400  # HTTP/1.1 without Host never reaches us


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1", "file://", "https://127.0.0.1:{}"],
)
def test_pages_of_other_origins_are_refused(origin: str, gateway: RunningGateway) -> None:
    answer = gateway.ask("/v1/models", headers={"Origin": origin.format(gateway.port)})
    assert refused(answer) == (403, "wrong_origin")
    assert "access-control-allow-origin" not in answer[1]


def test_its_own_page_may_ask(gateway: RunningGateway) -> None:
    assert gateway.ask("/v1/models", headers={"Origin": f"http://127.0.0.1:{gateway.port}"})[0] == 200


def test_a_preflight_is_allowed_nothing(gateway: RunningGateway) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    status, answered, _ = gateway.ask("/v1/chat/completions", method="OPTIONS", headers=headers)
    assert status == 403 and not [name for name in answered if name.startswith("access-control")]


def test_two_hosts_are_refused(gateway: RunningGateway) -> None:
    # h11 takes a request with two for broken; whoever answers, it is not served.
    assert gateway.ask("/v1/models", headers={"host": "evil.example"})[0] in (400, 403)


@pytest.mark.parametrize(
    "path",
    [
        "/static/../cli.py",
        "/static/%2e%2e/cli.py",
        "/static/..%2f..%2fcli.py",
        "/static//etc/passwd",
        "/static/%00",
        "/static/",
        "/nothing",
        "/static/missing.js",
    ],
)
def test_only_the_page_s_own_files_are_served(path: str, gateway: RunningGateway) -> None:
    assert refused(gateway.ask(path, headers={"Authorization": ""})) == (404, "not_found")


def test_every_answer_forbids_what_a_page_does_not_need(gateway: RunningGateway) -> None:
    for path in ("/", "/v1/models", "/nothing"):
        _, headers, _ = gateway.ask(path)
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers


@pytest.mark.parametrize(
    ("host", "header", "right"),
    [
        ("192.168.1.5", "192.168.1.5:80", True),
        ("192.168.1.5", "192.168.1.5", True),
        ("192.168.1.5", "localhost", True),
        ("192.168.1.5", "192.168.1.6", False),
        ("0.0.0.0", "10.0.0.7:80", True),
        ("0.0.0.0", "car.local:80", False),
        ("::", "[fe80::1]:80", True),
        ("::1", "[::1]:80", True),
        ("::1", "[::1]", True),
        ("::1", "[::1", False),
        ("dashboard.lan", "Dashboard.LAN:80", True),
        ("dashboard.lan", "dashboard.lan:080808", False),
    ],
)
def test_a_gateway_beyond_loopback_answers_to_what_it_was_bound_to(host: str, header: str, right: bool) -> None:
    assert (header in Hosts(host, 80)) is right


def test_a_key_is_made_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STIP_API_KEY", raising=False)
    first, fresh = api_key(None)
    assert fresh and first.startswith("stip-") and len(first) >= 5 + 42 and first != api_key(None)[0]


def test_a_key_is_taken_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STIP_API_KEY", "of-the-environment")
    file = tmp_path / "key"
    file.write_text("of-the-file-itself\n")
    assert api_key(None) == ("of-the-environment", False)
    assert api_key(file) == ("of-the-file-itself", False)


@pytest.mark.parametrize("key", ["", "short", "with a blank in the middle", "with-ünicode-characters", "x" * 15])
def test_a_key_that_guards_nothing_is_refused(key: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(key)
    with pytest.raises(UsageError, match="wanted 16 or more"):
        api_key(tmp_path / "key")
    with pytest.raises(UsageError, match="No such file"):
        api_key(tmp_path / "none")
