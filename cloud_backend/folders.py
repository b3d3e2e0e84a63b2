"""What the manifests of exported folders tell at once, before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from shared.errors import UsageError
from shared.levels import limit
from shared.manifest import CloudManifest, read_manifest

log = logging.getLogger("stip.cloud")


def check_folders(folders: Sequence[Path]) -> None:
    """Logs what protects each export. Raises BundleError where one cannot be read, and UsageError for an export given
    twice."""
    seen = set()
    for folder in folders:
        manifest = read_manifest(folder, CloudManifest)
        if (manifest.served_name, manifest.key_id) in seen:
            raise UsageError(f"{folder}: the same export was given twice", hint="give each folder once")
        seen.add((manifest.served_name, manifest.key_id))
        log.info("%s: %s", manifest.served_name, limit(manifest.scheme))
        if manifest.warning:
            log.warning("%s: %s", manifest.served_name, manifest.warning)
