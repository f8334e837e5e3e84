"""Conversations: read, rendered with the place of every message, refused where that is not known."""

from __future__ import annotations

import json

import pytest

from saekit.errors import InputError, ModelError
from saekit.inputs.chat import Conversation, clipped, render, template_of
from saekit.inputs.texts import read_texts

MESSAGES = [
    {"role": "user", "content": "the cat  sat"},
    {"role": "assistant", "content": " on a mat "},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "a"},
]
PLAIN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} |{% endfor %}"
TRIMMED = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }} |{% endfor %}"
SHOUTED = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | upper }} |{% endfor %}"
LAST = "{% for m in messages[-1:] %}[{{ m['role'] }}] {{ m['content'] }} |{% endfor %}"


class Tokenizer:
    """What renders templates as transformers' tokenizers do."""

    chat_template = None

    def apply_chat_template(self, messages, *, chat_template=None, tokenize=True):
        from jinja2 import Environment

        return Environment().from_string(chat_template or self.chat_template).render(messages=messages)


@pytest.mark.parametrize("template", [PLAIN, TRIMMED])
def test_every_message_is_found_where_the_template_puts_it(template):
    found = render(Tokenizer(), Conversation.of(MESSAGES), template)
    contents = [m["content"] for m in MESSAGES]
    assert (
        [found.text[a:b] for a, b, _ in found.parts] == [c.strip() for c in contents]
        if template is TRIMMED
        else contents
    )
    assert [role for *_, role in found.parts] == ["user", "assistant", "user", "assistant"]
    # a message that reads like the name of a role is not found in the header before it
    first, _, _ = found.parts[2]
    assert found.text[:first].endswith("[user] ")


@pytest.mark.parametrize("template", [SHOUTED, LAST])
def test_a_template_that_rewrites_or_drops_messages_is_refused(template):
    with pytest.raises(ModelError, match="must put the content of every message into the text once, in order"):
        render(Tokenizer(), Conversation.of(MESSAGES), template)


def test_no_template_and_a_template_that_refuses():
    with pytest.raises(ModelError, match=r"the tokenizer has none \(`Tokenizer`\).*--chat-template FILE"):
        render(Tokenizer(), Conversation.of(MESSAGES))
    with pytest.raises(ModelError, match=r"refuses a conversation with the roles \['user', 'assistant'"):
        render(Tokenizer(), Conversation.of(MESSAGES), "{{ messages[9]['role'].x.y }}")


def test_templates_come_from_files_too(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(PLAIN)
    assert template_of(str(file)) == template_of(PLAIN) == PLAIN
    with pytest.raises(InputError, match=r"`chat_template` must be a file with a Jinja template, or the template"):
        template_of(str(tmp_path / "none"))


def test_conversations_are_read_from_a_named_column(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": each, "id": 1}) + "\n" for each in (MESSAGES, MESSAGES[:2])))
    texts = read_texts(file, text="messages")
    assert [each.messages for each in texts] == [MESSAGES, MESSAGES[:2]]
    assert read_texts(file, text="messages").digest == texts.digest
    assert read_texts([{"messages": MESSAGES[:2]}], text="messages").digest != texts.digest
    assert clipped(texts[0], 3) == texts[0]
    with pytest.raises(InputError, match=r"Conversations are in `messages` \(--text messages\)"):
        read_texts(file)
    with pytest.raises(InputError, match=r"row 0 of .* message 1 is .*images"):
        read_texts([{"m": [MESSAGES[0], {"role": "assistant", "content": [{"type": "images"}]}]}], text="m")
