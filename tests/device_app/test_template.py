"""Chat templates: what transformers renders, in a sandbox, and errors that do not quote the conversation."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import pytest

from device_app.template import ChatTemplate
from shared.errors import BundleError
from tests.checkpoints import TEMPLATE, tiny_tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral and Gemma write them: special tokens, loop controls, namespaces, trimmed blocks, complaints.
DEMANDING = """{{ bos_token }}
{%- set state = namespace(count=0) %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% if (message['role'] == 'user') != (state.count % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate') }}
    {% endif %}
    {% set state.count = state.count + 1 %}
[{{ message.role | upper }}] {{ message.content | trim }} {{ message | tojson }}
{% endfor %}
{% if add_generation_prompt %}[ASSISTANT]{% endif %}
"""
# As models write them that were trained with TRL: what the assistant said is marked, and may stand in a loop.
MARKED = """{%- set said = 'outside' -%}
{% for message in messages %}
    {% if message.role == 'assistant' %}
        {%- generation -%}
        {% set said = 'inside' %}
        {{- '<' ~ message.content ~ said ~ loop.index ~ '>' }}
        {% endgeneration %}
    {% else %}
{{ message.role }}: {{ message.content }}{{ said }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}{% generation %}{% endgeneration %}assistant:{% endif %}
"""
JSON = """{% for message in messages %}
{{ message | tojson }}
{{ message | tojson(indent=2) }}
{{ message | tojson(ensure_ascii=True, sort_keys=True) }}
{{ message | tojson(separators=(',', ':')) }}
{{ message | tojson(true, 4, (', ', '='), true) }}
{% endfor %}"""
TOOLS = """{% if tools is not none %}{{ tools | length }} tools{% endif %}
{% if documents is none and tools is defined %}no documents{% endif %}
{{ messages[-1].content }}"""
CONVERSATION = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  Grüße, 世界! 'quoted' \"twice\" {{ 1 + 1 }} "},
    {"role": "assistant", "content": "Hello\n\nthere"},
    {"role": "user", "content": "And now?"},
]


def test_smollm2_is_given_its_own_system_prompt() -> None:
    assert ChatTemplate(SMOLLM2, {}).render([{"role": "user", "content": "What is 2 + 2?"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_smollm2_is_given_our_system_prompt_instead() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert ChatTemplate(SMOLLM2, {}).render(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "source",
    [SMOLLM2, DEMANDING, TEMPLATE, MARKED, JSON, TOOLS],
    ids=["smollm2", "demanding", "tiny", "marked", "json", "tools"],
)
@pytest.mark.parametrize("turns", [2, 3, 4])
def test_prompts_are_those_of_transformers(source: str, turns: int) -> None:
    tokenizer = tiny_tokenizer()
    expected = tokenizer.apply_chat_template(
        CONVERSATION[:turns], chat_template=source, tokenize=False, add_generation_prompt=True
    )
    special: dict[str, Any] = tokenizer.special_tokens_map
    assert ChatTemplate(source, special).render(CONVERSATION[:turns]) == expected


def test_the_text_of_a_message_is_not_a_template() -> None:
    messages = [{"role": "user", "content": "{{ 40 + 2 }}{% raw %}"}]
    assert "{{ 40 + 2 }}{% raw %}" in ChatTemplate(SMOLLM2, {}).render(messages)


def test_a_template_may_ask_for_the_date() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render([]) == datetime.now().strftime("%Y")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ raise_exception.__code__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{a.__class__}'.format_map({'a': 1}) }}",
        "{% set f = '{0.__class__}'.format %}{{ f('') }}",
        "{{ messages|map(attribute='__class__')|list }}{{ messages[0].x.y }}",
        "{{ self.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends '/etc/passwd' %}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(attack: str) -> None:
    try:
        reached = ChatTemplate(attack, {}).render([{"role": "user", "content": "hello"}])
    except BundleError:
        return
    assert reached == ""


@pytest.mark.parametrize("change", ["messages.append(1)", "messages.clear()", "messages[0].update({'role': 'x'})"])
def test_a_template_cannot_change_the_conversation(change: str) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(BundleError):
        ChatTemplate("{{ " + change + " }}", {}).render(messages)
    assert messages == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "broken",
    [
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 'a' * 10 ** 16 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'x'.encode('no such encoding') }}",
        "{{ messages[0].missing.attribute }}",
        "{{ 1 + 'a' }}",
        "{{ nothing() }}",
        "{{ {}.pop('x') }}",
    ],
)
def test_a_template_that_fails_is_a_bundle_error_with_a_hint(broken: str) -> None:
    with pytest.raises(BundleError, match=r"^chat template: ") as raised:
        ChatTemplate(broken, {}).render([{"role": "user", "content": "hello"}])
    assert raised.value.hint


@pytest.mark.parametrize(
    "broken",
    ["{% if %}", "{{ open", "{% nonsense %}", "{% endfor %}", "{% generation %}", "{{ 'a' | no_filter }}"],
)
def test_a_template_that_is_none_is_a_bundle_error(broken: str) -> None:
    with pytest.raises(BundleError, match=r"^chat template: "):
        ChatTemplate(broken, {})


def test_what_a_template_complains_of_is_said() -> None:
    messages = [{"role": "assistant", "content": "hello"}]
    with pytest.raises(BundleError, match="Conversation roles must alternate") as raised:
        ChatTemplate(DEMANDING, {"bos_token": ""}).render(messages)
    assert raised.value.hint


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('cannot answer: ' + messages[0].content) }}",
        "{{ raise_exception(messages[0].content) }}",
        "{{ messages[0][messages[0].content].x }}",
        "{{ (messages[0].content | int).x.y }}{{ messages[0].content + 1 }}",
        "{{ messages[0].content | float / none }}",
        "{% set x = {} %}{{ x[messages[0].content]() }}",
        "{{ strftime_now(messages[0]) }}",
    ],
)
def test_errors_do_not_quote_the_conversation(source: str) -> None:
    with pytest.raises(BundleError) as raised:
        ChatTemplate(source, {}).render([{"role": "user", "content": "my secret illness"}])
    assert not re.search("secret|illness", f"{raised.value} {raised.value.hint}")
    assert raised.value.__cause__ is None and raised.value.__suppress_context__
