"""What form an answer has: none, JSON, JSON of a schema, or a call of a tool."""

from __future__ import annotations

from collections.abc import Callable

from device_app.gateway.errors import ApiError, refused_value
from device_app.gateway.openai_types import ResponseFormat
from device_app.gateway.serving import ServedModel
from device_app.gateway.tools import Tools
from device_app.grammar import Constraint
from shared.errors import UsageError


def constraint_of(
    served: ServedModel, form: ResponseFormat | None, tools: Tools | None
) -> Callable[[], Constraint] | None:
    """Makes a fresh constraint for each choice; None where the answer is free. Raises ApiError (400).

    A forced call is JSON from its first character on, which every template's way of writing calls holds within.
    """
    free = form is None or form.type == "text"
    if tools is not None and not free:
        raise refused_value("response_format", "one beside tools", "one of the two")
    if free and (tools is None or not tools.forced):
        return None
    param = "tools" if free else "response_format"
    try:
        make = _maker(served, form, tools)
        make()  # what cannot be had is refused before anything is sent
    except UsageError as error:
        message = f"{error} ({error.hint})" if error.hint else str(error)
        raise ApiError(400, message, param=param, code="unsupported_value") from None
    return make


def _maker(served: ServedModel, form: ResponseFormat | None, tools: Tools | None) -> Callable[[], Constraint]:
    grammar = served.bundle.grammar
    if form is not None and form.type == "json_object":
        return grammar.json_object
    if form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema is None:
            raise UsageError("response_format: seen no json_schema.schema, wanted one")
        schema = form.json_schema.schema
    else:
        assert tools is not None
        schema = tools.schema()
    return lambda: grammar.json_schema(schema)
