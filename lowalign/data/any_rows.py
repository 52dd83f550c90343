"""Rows of sft or of preferences, whichever a file holds, for commands that measure on both."""

from lowalign.config.rows import MeasuredRowsConfig
from lowalign.config.sections import DataConfig, PreferenceConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import Dataset, load_examples
from lowalign.data.preferences import load_preferences
from lowalign.data.rows.mapping import Mapping
from lowalign.data.rows.preference_rows import PREFERENCE_ROWS
from lowalign.data.sources.row import Row


def load_any(file: str, chat: Chat, config: MeasuredRowsConfig) -> Dataset:
    """The rows of a file of preferences, with their ties, or of sft. Raises UserError as load_examples does."""
    rows = (row.data for row in Mapping().rows(file, config.limit) if isinstance(row, Row))
    options = {"max_length": config.max_length, "limit": config.limit, "on_error": config.on_error, "cache": False}
    options["prompt_format"] = config.prompt_format
    if PREFERENCE_ROWS.common(rows) is not None:
        options |= {"ties": "keep"}
        return load_preferences([file], chat, PreferenceConfig(**options))
    return load_examples([file], chat, DataConfig(**options))
