"""TLS with a private authority: who is answered, who is refused and why, and a certificate that is renewed."""

from __future__ import annotations

import ssl
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from cloud_backend.tls import Certificate
from shared.errors import UsageError
from tests.cloud_backend.asking import eventually, get
from tests.conftest import RunningCloud, run_cloud, run_cloud_process

AUTHORITY = trustme.CA()


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authority's certificate, for devices."""
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    AUTHORITY.cert_pem.write_to_path(path)
    return path


def written(folder: Path, leaf: trustme.LeafCert) -> tuple[Path, Path]:
    """The files of a server's certificate and key."""
    folder.mkdir(exist_ok=True)
    (folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    leaf.private_key_pem.write_to_path(folder / "key.pem")
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture(scope="module")
def cloud(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCloud]:
    leaf = AUTHORITY.issue_cert("127.0.0.1", "localhost")
    with run_cloud(tiny, tls=Certificate(*written(tmp_path_factory.mktemp("tls"), leaf)).context) as running:
        yield running


def chat(tiny: Path, url: str, ca: Path) -> subprocess.CompletedProcess[str]:
    """`stip-device chat`, asked once."""
    options = ("--url", url, "--ca", str(ca), "-p", "the cat", "--max-tokens", "3")
    command = [sys.executable, "-m", "device_app", "chat", str(tiny / "device"), *options]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def refused(tiny: Path, url: str, ca: Path) -> str:
    """The line of error with which `stip-device chat` ends."""
    done = chat(tiny, url, ca)
    assert done.returncode == 1 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("stip-device: error: ")]
    assert len(lines) == 1 and "hint: see --ca" in done.stderr, done.stderr
    return lines[0]


def test_a_device_that_trusts_the_authority_is_answered(cloud: RunningCloud, tiny: Path, ca: Path) -> None:
    done = chat(tiny, cloud.url, ca)
    assert cloud.url.startswith("wss://") and done.returncode == 0 and done.stdout.strip(), done.stderr


def test_health_is_asked_over_tls_too(cloud: RunningCloud, ca: Path) -> None:
    assert get(cloud.url, "/healthz", tls=ssl.create_default_context(cafile=str(ca))) == (200, "ok\n")


def test_a_device_that_trusts_another_authority_is_refused_with_the_cause(
    cloud: RunningCloud, tiny: Path, tmp_path: Path
) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    assert "unable to get local issuer certificate" in refused(tiny, cloud.url, tmp_path / "other.pem")


def test_a_certificate_for_another_host_is_refused_with_the_cause(tiny: Path, ca: Path, tmp_path: Path) -> None:
    leaf = AUTHORITY.issue_cert("cloud.example")
    with run_cloud(tiny, tls=Certificate(*written(tmp_path, leaf)).context) as running:
        assert "certificate is not valid for '127.0.0.1'" in refused(tiny, running.url, ca)


def test_a_certificate_that_expired_is_refused_with_the_cause(tiny: Path, ca: Path, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    leaf = AUTHORITY.issue_cert("127.0.0.1", not_before=now - timedelta(2), not_after=now - timedelta(1))
    with run_cloud(tiny, tls=Certificate(*written(tmp_path, leaf)).context) as running:
        assert "certificate has expired" in refused(tiny, running.url, ca)


# --- renewing ---


def served(url: str) -> str:
    """The certificate that a server shows now."""
    host, port = url.removeprefix("wss://").split(":")
    return ssl.get_server_certificate((host, int(port)))


def test_a_renewed_certificate_is_served_without_a_restart(tiny: Path, tmp_path: Path) -> None:
    cert, key = written(tmp_path, AUTHORITY.issue_cert("127.0.0.1"))
    with run_cloud_process(tiny / "cloud", "--tls-cert", cert, "--tls-key", key) as (url, _):
        before = served(url)
        assert before in cert.read_text()
        written(tmp_path, AUTHORITY.issue_cert("127.0.0.1"))
        assert eventually(lambda: served(url) != before)
        assert served(url) in cert.read_text()


def test_a_key_that_does_not_fit_keeps_the_certificate_before_and_is_logged_once(
    tiny: Path, ca: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, key = written(tmp_path, AUTHORITY.issue_cert("127.0.0.1"))
    certificate = Certificate(tmp_path / "cert.pem", key)
    with run_cloud(tiny, tls=certificate.context) as running:
        AUTHORITY.issue_cert("127.0.0.1").private_key_pem.write_to_path(key)
        for _ in range(3):
            certificate.look()
        assert [record.levelname for record in caplog.records if record.name == "stip.cloud"] == ["ERROR"]
        assert "TLS certificate" in caplog.text and "PRIVATE" not in caplog.text
        assert get(running.url, "/healthz", tls=ssl.create_default_context(cafile=str(ca)))[0] == 200


def test_files_that_are_no_certificate_are_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("no certificate")
    with pytest.raises(UsageError) as caught:
        Certificate(tmp_path / "cert.pem", tmp_path / "cert.pem")
    assert caught.value.hint
