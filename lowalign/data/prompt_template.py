"""Jinja files that a user may replace, rendered in a sandbox: the question to a judge, the prompts of `lowalign synth`."""

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lowalign.errors import UserError


class PromptTemplate:
    """A template and its text. what: its name in messages, such as "judge's template". variables: those it may use."""

    def __init__(self, file: Path, what: str, variables: Sequence[str], trim: bool = False) -> None:
        """trim: a line with nothing but a statement is no line of the text. Raises UserError, with file:line, for a file that
        cannot be read or is no template."""
        self.file, self._what, self._variables = file, what, variables
        try:
            self.text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the {what} {file} cannot be read ({error})") from error
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=trim, lstrip_blocks=trim)
        try:
            self._template = environment.from_string(self.text)
        except TemplateSyntaxError as error:
            raise UserError(f"{file}:{error.lineno}: {error.message}") from error

    def render(self, **values: Any) -> str:
        """The text with these values of all variables. Raises UserError with file:line."""
        try:
            return self._template.render(**values)
        except Exception as error:  # the user's template can fail in any way
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<template>"]
            where = f"{self.file}:{lines[-1]}" if lines else self.file
            names = f"{', '.join(self._variables[:-1])} and {self._variables[-1]}"
            raise UserError(
                f"{where}: {error or type(error).__name__} (a {self._what} has the variables {names})"
            ) from error
