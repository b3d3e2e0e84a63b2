"""One audit, from an export to a report in three forms."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from export.audit import base, blocks, fine_tuning, hidden, images, lengths, look_up, noise, theft, traffic
from export.audit.attack import Attack, Finding, carry_out
from export.audit.measures import measure
from export.audit.page import page
from export.audit.report import Report, make_report, percent, to_json
from export.audit.scene import Scene, open_scene
from shared.errors import AuditError
from shared.manifest import DeviceManifest, read_manifest

# From who knows least to who knows most.
ATTACKS: tuple[Attack, ...] = (
    *traffic.ATTACKS,
    *lengths.ATTACKS,
    *look_up.ATTACKS,
    *blocks.ATTACKS,
    *base.ATTACKS,
    *hidden.ATTACKS,
    *noise.ATTACKS,
    *theft.ATTACKS,
    *fine_tuning.ATTACKS,
    *images.ATTACKS,
)


def audit(out: Path, model: str | None = None, names: Sequence[str] = ()) -> Report:
    """Attacks the export in `out` and writes OUT/audit.json and OUT/audit.html.

    model: the public base model that the attacker has (hub id, folder or .gguf); without it some attacks do not apply.
    names: the attacks to run; all by default. Raises AuditError, BundleError, SourceError, and then writes nothing.
    """
    started = time.monotonic()
    chosen = [attack for attack in ATTACKS if not names or attack.name in names]
    if unknown := sorted(set(names) - {attack.name for attack in ATTACKS}):
        raise AuditError(
            f"attack: seen {', '.join(map(repr, unknown))}, wanted one of: {', '.join(one.name for one in ATTACKS)}"
        )
    scene = open_scene(out, model)
    findings = [_told(attack, scene, f"{number}/{len(chosen)}") for number, attack in enumerate(chosen, 1)]
    report = make_report(
        scene,
        findings,
        {} if names else measure(scene),
        manifest=read_manifest(out / "device", DeviceManifest),
        model=model,
        seconds=time.monotonic() - started,
    )
    _write(out, {"audit.json": to_json(report), "audit.html": page(report).encode()})
    return report


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    """All of `files`, or none: an older report stays until a whole one takes its place."""
    partial = {name: out / f".{name}.partial" for name in files}
    try:
        for name, contents in files.items():
            partial[name].write_bytes(contents)
        for name in files:
            partial[name].replace(out / name)
    except OSError as error:
        raise AuditError(f"report {out}: {error.strerror}", hint="give a folder you may write to") from None
    finally:
        for path in partial.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _told(attack: Attack, scene: Scene, number: str) -> Finding:
    print(f"  {number:>5}  {attack.title} … ", end="", file=sys.stderr, flush=True)
    finding = carry_out(attack, scene)
    print(finding.skipped or f"{percent(finding.recovered)} in {finding.seconds:.0f} s", file=sys.stderr, flush=True)
    return finding
