"""What a string means as a prompt or an answer: one rule for all verbs.

It is plain text: no chat template, and the completion ends with eos. With the option prompt-format chat it is a turn, of the
user as a prompt and of the assistant as an answer. Lists of messages are turns in any case.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from lowalign.config.sections import PromptFormat
from lowalign.data.rows.answers import Answers
from lowalign.data.rows.preference_rows import PromptAndCompletions
from lowalign.data.rows.sft_rows import Conversation, PlainText, PromptCompletion
from lowalign.data.rows.turns import Message, as_messages
from lowalign.data.sources.row import RowError
from lowalign.errors import UserError

TEXT, CHAT = "text", "chat"
PROMPT_FORMAT = "--data.prompt-format"
NAMES = {TEXT: "plain text", CHAT: "turns of a chat"}


def formatted(row: Any, option: PromptFormat | None) -> Any:
    """A prompt, or a parsed row, with its strings as turns where the option says so. Raises RowError for a row of training
    data with an empty prompt, which plain text may have."""
    if option != CHAT:
        return row
    match row:
        case str():
            return as_messages(row)
        case PromptCompletion():
            return Conversation([*_question(row.prompt), *as_messages(row.completion, "assistant")])
        case PromptAndCompletions(prompt=str()):
            answers = [as_messages(completion, "assistant") for completion in row.completions]
            return replace(row, prompt=_question(row.prompt), completions=answers)
        case Answers():
            answers = [as_messages(completion, "assistant") for completion in row.completions]
            return replace(row, prompt=as_messages(row.prompt), completions=answers)
    return row


def format_of(row: Any) -> PromptFormat | None:
    """The format of a prompt, or of a parsed row; None for a document, which has no prompt."""
    match row:
        case PlainText():
            return None
        case str() | PromptCompletion() | PromptAndCompletions(prompt=str()):
            return TEXT
        case Answers():
            return TEXT if row.plain_text else CHAT
    return CHAT


def formats_of(rows: Iterable[Any]) -> set[PromptFormat]:
    """The formats of these prompts or parsed rows."""
    return {found for found in map(format_of, rows) if found}


def check_prompt_format(adapter: str, trained: str | None, formats: Collection[str]) -> None:
    """Raises UserError when an adapter was trained on prompts of another format than these.

    trained: the `prompt_format` of its lowalign.json: "text", "chat", or anything else where it is not known or both.
    """
    other = next((found for found in sorted(formats) if found != trained), None)
    if trained not in NAMES or other is None:
        return
    hint = (
        f"A string is plain text; {PROMPT_FORMAT} chat makes it a turn"
        if other == TEXT
        else f"Write prompts and answers as strings, without {PROMPT_FORMAT} chat"
    )
    raise UserError(f"{adapter} was trained on {NAMES[trained]}, and these prompts are {NAMES[other]}. {hint}")


def _question(text: str) -> list[Message]:
    if not text.strip():
        raise RowError('"prompt" is empty; as a turn of the user it needs a text')
    return as_messages(text)
