"""What each level of protection is worth at most, in one line that every party can show."""

from __future__ import annotations

_LIMITS = {
    "permutation": "permutation is not encryption: who has the model's embedding table or weights reads every token",
    "rotation": "rotation stops simple look-ups alone: who has the embedding table or weights still reads every token",
}
SCHEMES = tuple(_LIMITS)


def limit(scheme: str) -> str:
    """The limit of a scheme's protection, for people. A scheme that this version does not know promises nothing."""
    return _LIMITS.get(scheme, f"this version knows no scheme {scheme!r}, so it can promise nothing; see SECURITY.md")
