from __future__ import annotations

from rlhfkit.chat.messages import Message, last_user_text


def test_last_user_text_is_the_newest_question() -> None:
    turns = [Message("user", "first"), Message("assistant", "answer"), Message("user", "second")]
    assert last_user_text(turns) == "second"
    assert last_user_text([*turns, Message("assistant", "more")]) == "second"
    assert last_user_text([Message("system", "be brief")]) == ""


def test_as_dict_is_what_templates_read() -> None:
    assert Message("user", "Hello").as_dict() == {"role": "user", "content": "Hello"}
