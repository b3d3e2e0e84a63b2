"""Asks the package index whether a Jetson can install the device: a table of aarch64 wheels for each Python.

    .venv/bin/python deploy/aarch64_wheels.py                           JetPack 6, Debian 12, JetPack 7
    .venv/bin/python deploy/aarch64_wheels.py --python 3.11 --dest DIR  keeps the wheels

Starting from what the `device` extra asks for, it follows what each wheel requires on that Python on aarch64, in the
versions of constraints.txt. pip itself would judge conditions like `python_version < "3.11"` by the Python that it runs
in. Exit status 1 where a wheel is missing. The index is the one that pip is configured for.
"""

from __future__ import annotations

import argparse
import email
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
GLIBC = {"3.10": 35, "3.11": 36, "3.12": 39}  # 2.x of Ubuntu 22.04 (JetPack 6), Debian 12, Ubuntu 24.04 (JetPack 7)


@dataclass(frozen=True)
class Target:
    """An aarch64 Linux with a Python."""

    python: str

    @property
    def environment(self) -> dict[str, str]:
        """What conditions of requirements are judged by (PEP 508)."""
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "platform_machine": "aarch64",
            "platform_system": "Linux",
            "sys_platform": "linux",
            "os_name": "posix",
        }

    @property
    def pip_options(self) -> list[str]:
        """Those that make pip choose wheels for this target."""
        names = [f"manylinux_2_{minor}_aarch64" for minor in range(GLIBC[self.python], 16, -1)]
        platforms = [f"--platform={name}" for name in (*names, "manylinux2014_aarch64", "linux_aarch64")]
        return ["--only-binary=:all:", "--implementation=cp", f"--python-version={self.python}", *platforms]

    def holds(self, requirement: Requirement, extra: str = "") -> bool:
        """Whether the target needs it."""
        return requirement.marker is None or requirement.marker.evaluate({**self.environment, "extra": extra})


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", choices=tuple(GLIBC), action="append", help="(default: all of them)")
    parser.add_argument("--dest", type=Path, metavar="DIR", help="keep the wheels there; with one --python")
    options = parser.parse_args()
    pythons = options.python or list(GLIBC)
    if options.dest is not None and len(pythons) > 1:
        parser.error("--dest: wanted one --python")
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        for python in pythons:
            folder = options.dest or Path(scratch) / python
            folder.mkdir(parents=True, exist_ok=True)
            print(f"Python {python}: asking for wheels", file=sys.stderr, flush=True)
            found[python] = wheels(Target(python), folder)
    sys.exit(_table(found))


def wheels(target: Target, folder: Path) -> dict[str, Path | str]:
    """Downloads all that the device needs to `folder`: the wheel of each package, or why there is none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["device"]]
    pinned = _pinned(target)
    found: dict[str, Path | str] = {}
    while wanted:
        named: dict[str, Requirement] = {canonicalize_name(one.name): one for one in wanted if target.holds(one)}
        new = {name: one for name, one in named.items() if name not in found}
        texts = {
            name: f"{name}=={pinned[name]}" if name in pinned else f"{name}{one.specifier}" for name, one in new.items()
        }
        found |= _downloaded(target, texts, folder)
        wanted = [
            needed
            for name, one in new.items()
            for needed in _requirements(found[name])
            if target.holds(needed) or any(target.holds(needed, extra) for extra in one.extras)
        ]
        wanted = [Requirement(f"{one.name}{_extras(one)}{one.specifier}") for one in wanted]
    return found


def _pinned(target: Target) -> dict[str, str]:
    """Package and version of each line of constraints.txt that is for this target."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    lines_for_target = (one for one in map(Requirement, filter(None, lines)) if target.holds(one))
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in lines_for_target}


def _downloaded(target: Target, texts: dict[str, str], folder: Path) -> dict[str, Path | str]:
    """All at once, which is quick; one after the other where that fails, to see which."""
    if _pip(target, list(texts.values()), folder).returncode == 0:
        return {name: _wheel(name, folder) for name in texts}
    found: dict[str, Path | str] = {}
    for name, text in texts.items():
        done = _pip(target, [text], folder)
        found[name] = _wheel(name, folder) if done.returncode == 0 else f"no wheel of {text}"
    return found


def _pip(target: Target, texts: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    if not texts:
        return subprocess.CompletedProcess([], 0)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    return subprocess.run([*command, *target.pip_options, *texts], capture_output=True, text=True, check=False)


def _wheel(name: str, folder: Path) -> Path:
    return next(path for path in folder.glob("*.whl") if parse_wheel_filename(path.name)[0] == name)


def _requirements(wheel: Path | str) -> list[Requirement]:
    """What a wheel says it requires (core metadata's Requires-Dist)."""
    if isinstance(wheel, str):
        return []
    with zipfile.ZipFile(wheel) as file:
        [metadata] = [name for name in file.namelist() if name.count("/") == 1 and name.endswith(".dist-info/METADATA")]
        message = email.message_from_bytes(file.read(metadata))
    return [Requirement(text) for text in message.get_all("Requires-Dist", [])]


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def _table(found: dict[str, dict[str, Path | str]]) -> int:
    """Prints it, and gives the exit status."""
    names = sorted({name for packages in found.values() for name in packages})
    rows = [["package", *(f"Python {python}" for python in found)]]
    rows += [[name, *(_cell(packages.get(name)) for packages in found.values())] for name in names]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    missing = [wheel for packages in found.values() for wheel in packages.values() if isinstance(wheel, str)]
    for python, packages in found.items():
        size = sum(wheel.stat().st_size for wheel in packages.values() if isinstance(wheel, Path) and wheel.exists())
        print(f"Python {python}: {len(packages)} packages" + (f", {size / 1e6:.0f} MB" if size else ""))
    return 1 if missing else 0


def _cell(wheel: Path | str | None) -> str:
    if wheel is None:
        return "not needed"
    if isinstance(wheel, str):
        return f"MISSING: {wheel}"
    _, version, _, tags = parse_wheel_filename(wheel.name)
    platforms = {tag.platform for tag in tags}
    return f"{version} {'any' if platforms == {'any'} else 'aarch64'}"


if __name__ == "__main__":
    main()
