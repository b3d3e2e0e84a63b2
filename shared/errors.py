"""One exception tree for the three parties.

    StipError                 everything this project raises on purpose
    ├── UsageError            the command line is wrong (exit status 2)
    ├── ExportError           the model developer's side
    │   ├── SourceError       the model cannot be read
    │   ├── FamilyError       no table covers this architecture or tensor
    │   ├── EquivalenceError  the transformed model does not compute what the original does
    │   └── AuditError        an audit cannot be made
    ├── BundleError           an exported folder is missing, damaged, edited or from another export
    ├── EngineError           what the cloud computes with is gone: its server ends
    ├── WireError             a frame breaks PROTOCOL.md; carries a protocol error code
    ├── Cancelled             an answer that somebody else stopped
    ├── RequestError          a well-formed request the cloud refuses; carries a protocol error code
    ├── HistoryError          chats cannot be kept or read on this device
    └── CloudError            the device cannot get what it needs from the cloud
        ├── RefusedError      the cloud answered with an Error; carries its code
        ├── DishonestError    the cloud's reply cannot be true (ids out of range, NaN, wrong lengths)
        └── UnreachableError  no connection, or it was lost and stayed lost

Every error names the thing, the value seen and the value wanted, and may carry a `hint`: what to do about it.
No message ever contains a prompt, a token id, an embedding or a key.
"""

from __future__ import annotations


class StipError(Exception):
    """Base of every error raised on purpose. `hint` says in one line what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(StipError):
    """The command line cannot be carried out as written."""


class ExportError(StipError):
    """A model could not be exported; nothing was left at the output path."""


class SourceError(ExportError):
    """The model to export cannot be read."""


class FamilyError(ExportError):
    """The architecture, or one of its tensors, is in no table."""


class EquivalenceError(ExportError):
    """The transformed model does not compute what the original computes."""


class AuditError(ExportError):
    """An audit cannot be made: the export, the model or an option does not fit."""


class BundleError(StipError):
    """An exported folder is missing, damaged, edited or from another export."""


class EngineError(StipError):
    """What an engine computes with is gone, such as a process that shares its model. The server cannot go on."""


class _Coded(StipError):
    def __init__(self, code: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code


class WireError(_Coded):
    """A frame that breaks PROTOCOL.md. `code` is one of its error codes; `seq` the request's, where one was read."""

    seq: int | None = None


class RequestError(_Coded):
    """A well-formed request that the cloud refuses. `code` is one of PROTOCOL.md's error codes."""


class HistoryError(StipError):
    """The chats kept on this device cannot be read or written. What was kept before is as it was."""


class Cancelled(StipError):
    """An answer was stopped from elsewhere while it was made."""


class CloudError(StipError):
    """The device cannot get what it needs from the cloud."""


class RefusedError(CloudError):
    """The cloud answered with an `Error` message. `code` is its error code."""

    def __init__(self, code: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code


class DishonestError(CloudError):
    """The cloud's reply cannot be true: ids out of range, values that are not finite, lengths that do not fit."""


class UnreachableError(CloudError):
    """The cloud cannot be reached, or the connection was lost and stayed lost."""
