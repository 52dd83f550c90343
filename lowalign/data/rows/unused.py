"""Columns that change what a row means, where its format does not use them: the row is refused, not read without them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lowalign.data.sources.row import RowError
from lowalign.errors import UserError


@dataclass(frozen=True)
class Meaning:
    """What a column means. values: whether a value matters. formats: those in which it does; None: in all."""

    why: str
    values: Callable[[Any], bool] = bool
    formats: tuple[str, ...] | None = None


def _is_bad(value: Any) -> bool:
    return value is not None and (value in (0, "0") or str(value).strip().lower() in ("false", "bad", "no"))


def _is_negative(value: Any) -> bool:
    return isinstance(value, int | float) and value < 0


MEDIA = dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), Meaning("only text is supported"))
SYSTEM = Meaning("a system text; --data.rename {name}=system uses it")
FUNCTIONS = Meaning("descriptions of functions; --data.rename {name}=tools uses them")
COMMON = MEDIA | {"system_prompt": SYSTEM, "system_message": SYSTEM, "functions": FUNCTIONS}
PART = Meaning(
    "its row is not a document; name the format with --data.shape", lambda value: value is not None, ("text",)
)
FLAT = Meaning("one turn of a tree of turns in each row, not a document", lambda value: value is not None, ("text",))
ANSWERS = ("messages", "sharegpt", "prompt-completion", "alpaca")
BAD = Meaning("a bad answer; lowalign dpo --dpo.loss kto learns from it", _is_bad, ANSWERS)
PREFERENCE = Meaning("a preference; lowalign dpo and lowalign reward use it")
# Of rows with preferences, and of rows for fine-tuning.
PREFERENCE_MEANINGS = COMMON
SFT_MEANINGS = COMMON | {
    "system": Meaning("a system text, which has no place in plain text or documents"),
    "tools": Meaning("functions, which have no place in rows without turns"),
    **dict.fromkeys(("label", "kto_tag"), BAD),
    "score": Meaning("a negative score; lowalign reward and dpo use scores", _is_negative, ANSWERS),
    **dict.fromkeys(("chosen", "rejected", "chosen_messages", "rejected_messages"), PREFERENCE),
    **dict.fromkeys(("prompt", "completion", "instruction", "output"), PART),
    **dict.fromkeys(("role", "parent_id", "message_id", "message_tree_id"), FLAT),
}


def refuse_unused(
    data: Mapping[str, Any], unused: Collection[str], row_format: str, meanings: Mapping[str, Meaning]
) -> None:
    """Raise RowError when an unused column of the row changes its meaning."""
    for name in data:
        meaning = meanings.get(name) if name in unused else None
        if meaning and meaning.values(data[name]) and row_format in (meaning.formats or (row_format,)):
            why = meaning.why.format(name=name)
            raise RowError(
                f'"{name}" would not be used, and the row means something else without it ({why}); '
                f"--data.ignore {name} reads the row without it"
            )


def with_columns(data: dict[str, Any], rename: Mapping[str, str], ignore: Collection[str]) -> dict[str, Any]:
    """The row with columns renamed, and without those to ignore. Raises RowError when a new name is there already."""
    if not (rename or ignore):
        return data
    renamed: dict[str, Any] = {}
    for name, value in data.items():
        if name in ignore:
            continue
        name = rename.get(name, name)
        if name in renamed:
            raise RowError(f'two columns are called "{name}" after --data.rename')
        renamed[name] = value
    return renamed


def read_renames(renames: Collection[str]) -> dict[str, str]:
    """{old: new} of OLD=NEW … Raises UserError."""
    pairs = [rename.partition("=") for rename in renames]
    for old, equals, new in pairs:
        if not (old and equals and new):
            raise UserError(f"--data.rename {old}{equals}{new}: write OLD=NEW, for example functions=tools")
    return {old: new for old, _, new in pairs}
