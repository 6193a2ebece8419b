"""Chat messages → prompt text, by the checkpoint's own Jinja template, run in a sandbox."""

import json
from datetime import datetime
from pathlib import Path

from loaders.errors import CheckpointError, PromptError
from loaders.json_file import read_bytes, read_json

MAX_LISTED = 80         # characters of a foreign value or error text that a message repeats


class ChatTemplate:
    """One compiled template. `source` begins the errors that are the template's fault."""

    def __init__(self, text, source):
        """Raises CheckpointError where `text` is not a template."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.source = source
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{source}: line {error.lineno}: {error.message}") from error

    @classmethod
    def load(cls, directory):
        """The template of a checkpoint directory, or None where it has none.

        Looks in chat_template.jinja, chat_template.json, tokenizer_config.json, in this order; of a list of named
        templates it takes "default". Raises CheckpointError for a broken file.
        """
        file = Path(directory) / "chat_template.jinja"
        if file.is_file():
            try:
                return cls(read_bytes(file).decode("utf-8"), file)
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{file}: not UTF-8 at byte {error.start}") from error
        for name in ("chat_template.json", "tokenizer_config.json"):
            file = Path(directory) / name
            value = read_json(file).get("chat_template") if file.is_file() else None
            if value is not None:
                return cls(_default_template(value, file), file)
        return None

    def render(self, messages, special_tokens, add_generation_prompt=True, **extra):
        """The prompt text of a conversation.

        messages        [{"role": str, "content": str or a list of parts}, ...]; a part is {"type": "text", "text": str}
                        or of a type that the template knows; content may be None or absent beside tool_calls
        special_tokens  {"bos_token": "<bos>", ...}: what the template may call by name
        add_generation_prompt   end with the opening of the model's turn
        extra           more names for the template, e.g. tools, enable_thinking

        The text holds its own <bos> where the template writes one: encode it with add_special_tokens=False.
        Raises PromptError for malformed messages and for what the template itself objects to; CheckpointError for a
        template that does what the sandbox forbids.
        """
        from jinja2.exceptions import SecurityError

        _check(messages)
        # tools and documents stand in every context, as None: templates ask `tools is not none`
        names = {"tools": None, "documents": None, **special_tokens, **extra,
                 "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(names)
        except _Objection as error:
            raise PromptError(f"chat template: {error}") from error
        except SecurityError as error:
            raise CheckpointError(f"{self.source}: does what a template may not: {error}") from error
        except Exception as error:      # whatever foreign code can raise, on these messages
            raise PromptError(f"chat template: fails on these messages: {type(error).__name__}: {error}") from error


class _Objection(Exception):
    """raise_exception(...) was called by a template."""


def _raise_exception(message):
    raise _Objection(message)


def _strftime_now(format):
    return datetime.now().strftime(format)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """The filter `tojson` as templates were written for: plain text, where Jinja's own escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _default_template(value, file):
    """The template text in the value of a `chat_template` key."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        named = {item.get("name"): item.get("template") for item in value}
        if "default" not in named:
            raise CheckpointError(f"{file}: chat_template has {_short(list(named))}, expected one named 'default'")
        value = named["default"]
    if not isinstance(value, str):
        raise CheckpointError(f"{file}: chat_template is {_short(value)}, expected a string or a list of "
                              "{name, template}")
    return value


def _check(messages):
    """Raises PromptError, naming the message and the part."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise PromptError(f"messages is {_short(messages)}, expected a list of {{'role': ..., 'content': ...}}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise PromptError(f"messages[{i}] is {_short(message)}, expected a dict with a 'role' and a 'content'")
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue
        if not isinstance(content, (str, list)):
            raise PromptError(f"messages[{i}]: content is {_short(content)}, expected text or a list of parts")
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise PromptError(f"messages[{i}]: content[{j}] is {_short(part)}, expected a dict with a 'type'")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise PromptError(f"messages[{i}]: content[{j}] is {_short(part)}, expected its 'text' to be a str")


def _short(value):
    text = repr(value)
    return text if len(text) <= MAX_LISTED else text[: MAX_LISTED - 3] + "..."
