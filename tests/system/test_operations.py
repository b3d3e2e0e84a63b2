"""What README.md says of operations works as it is printed, and the files in deploy/ fit the command they start."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib
import yaml

from cloud_backend.cli import command_line
from tests.conftest import RunningCloud, run_cloud

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().partition("\n## Operations\n")[2].partition("\n## ")[0]
INSTALL, CREDENTIALS, SERVE = re.findall(r"^```\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
UNIT = (ROOT / "deploy" / "stip-cloud.service").read_text()
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", "")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


# --- README ---


@pytest.fixture
def place(tiny: Path, tmp_path: Path) -> Path:
    """A folder with an export, and the commands as an installation has them."""
    (tmp_path / "smollm2").symlink_to(tiny)
    (tmp_path / "bin").mkdir()
    for command, package in (("stip-cloud", "cloud_backend"), ("stip-device", "device_app")):
        script = tmp_path / "bin" / command
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {package} "$@"\n')
        script.chmod(0o755)
    return tmp_path


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("openssl")), reason="wants curl and openssl")
def test_the_printed_operations_work(place: Path) -> None:
    script = SERVE.replace("8765", (port := str(free_port()))).replace("9464", str(free_port()))
    script = script.replace("--host 0.0.0.0 --token", f"--host 0.0.0.0 --port {port} --token")
    script = script.replace(" chat ", " chat --max-tokens 4 ")
    environment = os.environ | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    # The trap is ours: nothing stays behind where a command fails.
    script = f"set -e -o pipefail\ntrap 'kill -KILL $(jobs -p) 2>/dev/null || true' EXIT\n{CREDENTIALS}{script}"
    done = subprocess.run(["bash", "-c", script], cwd=place, env=environment, capture_output=True, text=True)
    log = (place / "log.jsonl").read_text()
    assert done.returncode == 0, done.stderr + log
    assert done.stdout.splitlines()[:3] == ["ok", "ok", 'stip_sessions_open{model="llama"} 0.0']
    assert "4 tokens" in done.stderr and '"event": "session closed"' in log


def test_the_printed_installation_is_that_of_the_makefile() -> None:
    assert "pip install -c constraints.txt '.[cloud,device]'" in INSTALL
    assert subprocess.run(["bash", "-n", "-c", INSTALL]).returncode == 0


def test_the_printed_size_of_a_position_is_right() -> None:
    layers, heads, size, value = 30, 3, 64, 4
    position = 2 * layers * heads * size * value
    assert f"2 × {layers} × {heads} × {size} × {value} = {position:,}" in SECTION
    assert f"1G holds {2**30 // position:,} positions: {2**30 // position // 1024} conversations of 1,024" in SECTION


@pytest.mark.parametrize("option", ["max-sessions", "token-sessions", "idle-seconds", "drain-seconds"])
def test_the_printed_defaults_are_those_of_the_command(option: str) -> None:
    parsed = command_line().parse_args(["serve", "cloud"])
    assert f"`--{option}` ({getattr(parsed, option.replace('-', '_')):g})" in SECTION


# --- Dockerfile ---


def instruction(name: str) -> list[str]:
    """What follows an instruction, each time that it stands in the Dockerfile."""
    return re.findall(rf"^\s*{name} +(.*)$", DOCKERFILE, re.MULTILINE)


def test_every_path_that_the_image_copies_is_there_and_not_ignored() -> None:
    kept = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().split()
    copied = [path for line in instruction("COPY") if "--from" not in line for path in line.split()[:-1]]
    assert len(copied) == 8
    for path in copied:
        assert (ROOT / path).exists() and f"!{path}" in kept


def test_the_image_has_every_package_and_file_that_its_installation_reads() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {package.partition(".")[0] for package in project["tool"]["setuptools"]["packages"]}
    needed |= {project["project"]["readme"], *project["project"]["license-files"]}
    assert needed <= {path for line in instruction("COPY") for path in line.split()[:-1]}


def arguments_of_the_image() -> list[str]:
    (command,) = [line for line in instruction("CMD") if "serve" in line]
    return yaml.safe_load(command)  # type: ignore[no-any-return]


def test_the_image_starts_a_command_that_exists_as_a_user_without_rights() -> None:
    parsed = command_line().parse_args(arguments_of_the_image())
    assert parsed.command.__name__ == "_serve" and parsed.tls_key and parsed.token_file
    assert yaml.safe_load(instruction("ENTRYPOINT")[0]) == ["stip-cloud"]
    assert int(instruction("USER")[0].partition(":")[0]) > 0


@pytest.fixture(scope="module")
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


@pytest.mark.parametrize("loading", [False, True])
def test_the_health_check_of_the_image_tells_a_server_that_works_from_one_that_does_not(
    cloud: RunningCloud, loading: bool
) -> None:
    (check,) = re.findall(r"^HEALTHCHECK .* CMD (.*)$", DOCKERFILE, re.MULTILINE)
    _, *words = yaml.safe_load(check)
    assert f":{command_line().parse_args(arguments_of_the_image()).metrics_port}/healthz" in check
    port = cloud.url.rsplit(":", 1)[1]
    cloud.server.health.loading = loading
    done = subprocess.run([sys.executable, *(word.replace("9464", port) for word in words)], capture_output=True)
    assert (done.returncode == 0) is not loading


# --- systemd, Prometheus ---


def test_the_unit_starts_a_command_that_exists_and_outlives_its_drain() -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", UNIT.replace("\\\n", ""), re.MULTILINE)
    _, *arguments = shlex.split(line)
    parsed = command_line().parse_args(arguments)
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    assert parsed.drain_seconds < int(stop)
    credentials = re.findall(r"^LoadCredential=(\w+):", UNIT, re.MULTILINE)
    assert [str(parsed.tls_cert), str(parsed.tls_key)] == [f"%d/{name}" for name in credentials]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="wants systemd-analyze")
def test_systemd_takes_the_unit_and_finds_it_hardened(tmp_path: Path) -> None:
    unit = tmp_path / "stip-cloud.service"
    unit.write_text(UNIT.replace("/opt/stip/bin/stip-cloud", "/bin/true"))  # which need not be installed here
    verified = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (0, "")
    scored = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", unit]
    assert subprocess.run(scored, capture_output=True).returncode == 0  # exposed at most 2.0 of 10


def test_prometheus_is_told_the_port_of_the_unit() -> None:
    (job,) = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    assert f"--metrics-port {target.partition(':')[2]} " in UNIT
