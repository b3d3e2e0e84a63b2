"""One audit, from an export to a report in three forms."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from export.audit import base, hidden, look_up, noise, theft, traffic
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
    *look_up.ATTACKS,
    *base.ATTACKS,
    *hidden.ATTACKS,
    *noise.ATTACKS,
    *theft.ATTACKS,
)


def audit(out: Path, model: str | None = None, names: Sequence[str] = ()) -> Report:
    """Attacks the export in `out` and writes OUT/audit.json and OUT/audit.html.

    model: the public base model that the attacker has (hub id, folder or .gguf); without it some attacks do not apply.
    names: the attacks to run; all by default. Raises AuditError, BundleError, SourceError.
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
    try:
        (out / "audit.json").write_bytes(to_json(report))
        (out / "audit.html").write_text(page(report), encoding="utf-8")
    except OSError as error:
        raise AuditError(
            f"report {out / 'audit.json'}: {error.strerror}", hint="give a folder you may write to"
        ) from None
    return report


def _told(attack: Attack, scene: Scene, number: str) -> Finding:
    print(f"  {number:>5}  {attack.title} … ", end="", file=sys.stderr, flush=True)
    finding = carry_out(attack, scene)
    print(finding.skipped or f"{percent(finding.recovered)} in {finding.seconds:.0f} s", file=sys.stderr, flush=True)
    return finding
