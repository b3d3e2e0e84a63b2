"""Chat templates, in a sandbox: a template comes with a model and may not reach the device."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import BundleError


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}, which marks what an assistant said, for training: its body as it is."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)  # what is set inside ends there, as in transformers


class ChatTemplate:
    """Renders messages to prompt text as transformers does. Raises BundleError if the template cannot be used."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens = dict(special_tokens)
        self._source = source
        try:
            self._template = environment.from_string(source)
            self._parsed = environment.parse(source)
        except jinja2.TemplateError as error:
            raise BundleError(f"chat template: {error}") from None

    @property
    def takes_tools(self) -> bool:
        """Whether it has a place for functions that the model may call."""
        return "tools" in meta.find_undeclared_variables(self._parsed)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The prompt text for `messages` (role and content), ending where the assistant's answer begins.

        Content is text, or for models that take images a list of parts as their templates want it. tools: functions
        that the model may call, as JSON schemas.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],  # always defined: templates ask
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except Exception as error:  # whatever a template does wrong, dividing by zero and endless recursion included
            # The text of an error can quote the conversation, unless it stands in the template; its kind cannot.
            detail = str(error) if str(error) and str(error) in self._source else type(error).__name__
            raise BundleError(
                f"chat template: {detail}", hint="does this model take these roles in this order?"
            ) from None


def _refuse(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateRuntimeError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which changes prompts. Names and order are those of transformers' filter.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
