"""loaders/chat_template.py: templates found, rendered as they were written to be, and kept in their sandbox."""

import json
import re
from datetime import datetime

import pytest

from loaders.chat_template import ChatTemplate
from loaders.errors import CheckpointError, PromptError

TOKENS = {"bos_token": "<bos>"}
HELLO = [{"role": "user", "content": "hello"}]
# the shape of the Gemma templates: alternation enforced, assistant renamed, text or parts
TURNS = """{{ bos_token }}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception("roles must alternate") }}
    {% endif %}
    {{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}{% continue %}{% endif %}
            {{- part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<turn|>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|turn>model\\n' }}
{%- endif %}
"""


def render(text, messages=HELLO, **extra):
    return ChatTemplate(text, "chat_template.jinja").render(messages, TOKENS, **extra)


# --- where templates are found

def test_order_of_the_files(tmp_path):
    assert ChatTemplate.load(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"bos_token": "<bos>"}')
    assert ChatTemplate.load(tmp_path) is None
    config.write_text('{"chat_template": "config {{ bos_token }}"}')
    assert ChatTemplate.load(tmp_path).render(HELLO, TOKENS) == "config <bos>"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert ChatTemplate.load(tmp_path).render(HELLO, TOKENS) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja é", encoding="utf-8")
    assert ChatTemplate.load(tmp_path).render(HELLO, TOKENS) == "jinja é"


def test_a_list_of_templates_has_a_default(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.load(tmp_path).render(HELLO, TOKENS) == "plain"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(CheckpointError, match=r"chat_template has \['tool_use'\], expected one named 'default'"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("value", [7, {}, ["a"], [{"name": "default"}], [{"name": "default", "template": 7}]])
def test_a_template_is_a_string(tmp_path, value):
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(CheckpointError, match=r"chat_template\.json: chat_template is "):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(("name", "data", "expected"), [
    ("chat_template.jinja", b"ab\xff", "not UTF-8 at byte 2"),
    ("chat_template.jinja", b"line\n{% if %}", "line 2: "),
    ("chat_template.jinja", b"{{ x | nosuchfilter }}", "line 1: No filter named 'nosuchfilter'"),
    ("chat_template.json", b"{", "expected JSON"),
    ("tokenizer_config.json", b"[]", "expected a JSON object"),
    ("tokenizer_config.json", b'{"chat_template": "{% for %}"}', "line 1: "),
])
def test_broken_files(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: .*{re.escape(expected)}"):
        ChatTemplate.load(tmp_path)


# --- rendering

def test_a_conversation():
    messages = [{"role": "user", "content": " one "}, {"role": "assistant", "content": "two"},
                {"role": "user", "content": [{"type": "text", "text": "three"}, {"type": "image"},
                                             {"type": "text", "text": "four"}]}]
    text = "<bos>\n<|turn>user\none<turn|>\n<|turn>model\ntwo<turn|>\n<|turn>user\nthreefour<turn|>\n"
    assert render(TURNS, messages, add_generation_prompt=False) == text
    assert render(TURNS, messages) == text + "<|turn>model\n"


def test_blocks_are_trimmed_as_templates_expect():
    assert render("  {% if true %}\na\n  {% endif %}\nb\n") == "a\nb"       # block lines vanish, and the last newline


def test_the_template_objects():
    with pytest.raises(PromptError, match=r"chat template: roles must alternate"):
        render(TURNS, HELLO + HELLO)


def test_names_a_template_finds():
    assert render("{{ tools is none }} {{ documents is none }} {{ enable_thinking is defined }}") == "True True False"
    assert render("{{ tools[0].name }} {{ enable_thinking }}", tools=[{"name": "f"}], enable_thinking=True) == "f True"
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)


def test_tojson_is_plain_json():
    tool = {"b": "<é> & 'q'", "a": [1, None]}
    assert render("{{ tools | tojson }}", tools=tool) == """{"b": "<é> & 'q'", "a": [1, null]}"""
    assert json.loads(render("{{ tools | tojson(indent=2) }}", tools=tool)) == tool
    assert render("{{ tools | tojson(indent=2, sort_keys=true) }}", tools=tool).startswith('{\n  "a"')


def test_the_text_of_a_message_is_not_a_template():
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "{{ 1 + 1 }} {% if %}<b>"}]) == \
        "{{ 1 + 1 }} {% if %}<b>"


def test_template_that_takes_no_parts():
    """The template's own error, as the caller's."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    with pytest.raises(PromptError, match="fails on these messages: TypeError: can only concatenate str"):
        render("{{ '<|turn>' + messages[0]['content'] }}", parts)


@pytest.mark.parametrize(("messages", "expected"), [
    ([], r"messages is \[\], expected a list"),
    ("hello", "messages is 'hello', expected a list"),
    (HELLO[0], "messages is .*expected a list"),
    ([*HELLO, "hello"], r"messages\[1\] is 'hello', expected a dict with a 'role'"),
    ([{"content": "hello"}], r"messages\[0\] is .*expected a dict with a 'role'"),
    ([{"role": 1, "content": "hello"}], r"messages\[0\] is "),
    ([*HELLO, {"role": "assistant"}], r"messages\[1\]: content is None, expected text or a list of parts"),
    ([{"role": "user", "content": 7}], r"messages\[0\]: content is 7"),
    ([{"role": "user", "content": ["hi"]}], r"messages\[0\]: content\[0\] is 'hi', expected a dict with a 'type'"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}], r"content\[1\] is .*a 'type'"),
    ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\] is .*expected its 'text' to be a str"),
    ([{"role": "user", "content": [{"type": "text", "text": "x" * 10**6, "n": 1}, 1]}], r"content\[1\] is 1, "),
])
def test_malformed_messages_are_named(messages, expected):
    with pytest.raises(PromptError, match=expected) as caught:
        render("never rendered {{ 1 / 0 }}", messages)
    assert len(str(caught.value)) < 250


def test_tool_calls_need_no_content():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    assert render("{{ messages[1].tool_calls[0].function.name }}", [*HELLO, call]) == "f"


# --- the sandbox

@pytest.mark.parametrize("text", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages[0].clear() }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{% set f = cycler.__init__.__globals__ %}{{ f.os.system('true') }}",
])
def test_a_template_stays_in_its_sandbox(text):
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: does what a template may not: "):
        render(text, messages)
    assert messages == HELLO


@pytest.mark.parametrize("text", ["{% include '/etc/hostname' %}", "{{ range(10**9) | list }}", "{{ open('x') }}",
                                  "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{{ 1 / 0 }}", "{{ a.b.c }}"])
def test_a_template_that_fails_is_one_error(text):
    with pytest.raises(PromptError, match="chat template: fails on these messages: "):
        render(text)
