"""An arm64 Debian in a folder with the device's dependencies, and programs that run in it on another processor.

qemu-user-static translates one process; its files are looked for under QEMU_LD_PREFIX first. Nothing is mounted,
nothing is installed on the machine, and what runs in it is no more confined than any other process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITE, PYTHON = "bookworm", "3.11"
PACKAGES = ("python3.11", "libpython3.11-stdlib", "libstdc++6", "libgomp1", "libssl3", "ca-certificates")
NEEDED = {"qemu-aarch64-static": "qemu-user-static", "mmdebstrap": "mmdebstrap"}  # command: Debian's package of it
# onnxruntime reads it when it is imported, and crashes on an x86 processor's.
CPUINFO = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""


class EmulationError(Exception):
    """The emulated machine cannot be had; says what is missing."""


@dataclass(frozen=True)
class Emulated:
    """The machine, in a folder."""

    folder: Path

    @classmethod
    def made(cls, folder: Path) -> Emulated:
        """Made in `folder`, unless it is there. Raises EmulationError."""
        for command, package in NEEDED.items():
            if shutil.which(command) is None:
                raise EmulationError(f"{command}: not found; install Debian's package {package}")
        machine = cls(folder)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            machine._make_root()
            machine._install_wheels()
            (folder / "made").touch()
        return machine

    def python(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs its Python on this project's code. Raises CalledProcessError."""
        environment = os.environ | {
            "QEMU_LD_PREFIX": str(self._root),
            "PYTHONPATH": f"{ROOT}:{self._site}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = ["qemu-aarch64-static", self._root / f"usr/bin/python{PYTHON}", *arguments]
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)

    @property
    def _root(self) -> Path:
        return self.folder / "root"

    @property
    def _site(self) -> Path:
        return self.folder / "site-packages"

    def _make_root(self) -> None:
        # Unpacked, not installed: no script of a package runs, so that nothing needs root or binfmt_misc.
        options = ["--architectures=arm64", "--variant=extract", "--skip=check/qemu", f"--include={','.join(PACKAGES)}"]
        _run(["mmdebstrap", *options, SUITE, self._root])
        (self._root / "proc").mkdir(exist_ok=True)
        (self._root / "proc" / "cpuinfo").write_text(CPUINFO)

    def _install_wheels(self) -> None:
        wheels = self.folder / "wheels"
        _run([sys.executable, ROOT / "deploy" / "aarch64_wheels.py", "--python", PYTHON, "--dest", wheels])
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(self._site)
        shutil.rmtree(wheels)


def _run(command: Sequence[str | Path]) -> None:
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise EmulationError(f"{command[0]}: it failed with exit status {error.returncode}") from None
