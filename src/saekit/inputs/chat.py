"""Conversations: messages with roles, and where a chat template puts them into the text that a model reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from ..errors import InputError, ModelError
from ..files import check_path

_MARK = "\ue000{}\ue001"
"""What stands for the content of a message while it is found where a template puts it: private characters."""


class Conversation(str):
    """A conversation as a text: its messages in JSON, from which a model's chat template makes what the model reads.

    A text among texts, so that all that is done with texts (documents, digests, splits) is done with it too.
    """

    __slots__ = ()

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], where: str = "a conversation") -> Conversation:
        """Return the conversation of messages ``{"role": …, "content": …}``.

        Raises
        ------
        InputError
            A message has no role, or content that is no text (images, calls of tools).
        """
        plain = []
        for number, message in enumerate(messages):
            role, content = (message.get(key) if isinstance(message, Mapping) else None for key in ("role", "content"))
            if not isinstance(role, str) or not isinstance(content, str) or message.get("tool_calls"):
                raise InputError(
                    f"{where}: every message must be {{'role': …, 'content': …}} with texts and no calls of tools; "
                    f"message {number} is {str(message)[:80]!r}. Leave such conversations out."
                )
            plain.append({"role": role, "content": content})
        return cls(json.dumps(plain, ensure_ascii=False))

    @property
    def messages(self) -> list[dict[str, str]]:
        """Its messages."""
        found: list[dict[str, str]] = json.loads(self)
        return found


def is_chat(value: object) -> TypeGuard[list[dict[str, Any]]]:
    """Return whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def clipped(text: str, characters: int | None) -> str:
    """Return the first characters of a text; a conversation is never cut."""
    return text if isinstance(text, Conversation) else text[:characters]


def n_characters(text: str) -> int:
    """Return the length of a text, or of what is said in a conversation."""
    return sum(len(m["content"]) for m in text.messages) if isinstance(text, Conversation) else len(text)


def template_of(value: str | None) -> str | None:
    """Return a chat template: `value` itself where it is Jinja, else what the file of that name holds.

    Raises
    ------
    InputError
        There is no such file.
    """
    if value is None or "{" in value:
        return value
    try:
        return check_path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"`chat_template` must be a file with a Jinja template, or the template; `{value}` is neither ({error})."
        ) from None


@dataclass(frozen=True)
class Rendered:
    """What a model reads of a conversation."""

    text: str
    """Content of all messages, and what the template puts around them."""
    parts: list[tuple[int, int, str]]
    """Where the content of each message begins and ends in the text, and the role of the message."""


def render(tokenizer: Any, conversation: Conversation, template: str | None = None) -> Rendered:
    """Return a conversation as the chat template of a tokenizer writes it, with the place of every message.

    The template is applied twice: to the messages, and to marks instead of them. What comes of the marks, with the
    contents put in again (as they are, or without spaces around them), must be what came of the messages.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    conversation
        The conversation.
    template
        A Jinja template instead of the tokenizer's own.

    Raises
    ------
    ModelError
        There is no template; or it does more with contents than to put them in: where they are is then not known.
    """
    if template is None and not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"conversations need a chat template, and the tokenizer has none (`{type(tokenizer).__name__}`): the model "
            "was not made for them. Give a template (--chat-template FILE, `chat_template`), or texts."
        )
    messages = conversation.messages
    marked = [message | {"content": _MARK.format(at)} for at, message in enumerate(messages)]
    whole, frame = (_applied(tokenizer, each, template) for each in (messages, marked))
    for contents in ([m["content"] for m in messages], [m["content"].strip() for m in messages]):
        found = _filled(frame, contents, [m["role"] for m in messages])
        if found is not None and found.text == whole:
            return found
    raise ModelError(
        "the chat template must put the content of every message into the text once, in order, and leave it as it is; "
        f"in a conversation that begins with {str(messages[0])[:80]!r} it does not (it may drop or rewrite parts). "
        "Which tokens are whose is not known then: give another template (--chat-template FILE), or other messages."
    )


def _applied(tokenizer: Any, messages: list[dict[str, str]], template: str | None) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        raise ModelError(
            f"the chat template refuses a conversation with the roles {[m['role'] for m in messages]}: {error}. "
            "Give another template (--chat-template FILE), or leave such conversations out."
        ) from None


def _filled(frame: str, contents: Sequence[str], roles: Sequence[str]) -> Rendered | None:
    """Return the frame with contents in place of the marks; None where a mark is missing, repeated or out of order."""
    text, parts = "", []
    for at, (content, role) in enumerate(zip(contents, roles, strict=True)):
        before, mark, frame = frame.partition(_MARK.format(at))
        if not mark:
            return None
        text += before
        parts.append((len(text), len(text) + len(content), role))
        text += content
    return None if "\ue000" in frame else Rendered(text + frame, parts)
