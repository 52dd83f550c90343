"""The text of --help, with types that a person reads: N and NUMBER, not {None}|INT and FLOAT."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator

TYPES = {"INT": "N", "FLOAT": "NUMBER", "STR": "TEXT", "PATH": "FILE"}


@contextlib.contextmanager
def readable_help() -> Iterator[None]:
    """Rewrite what is printed within it."""
    text = io.BytesIO()
    encoding = sys.stdout.encoding or "utf-8"  # the parser draws a frame in UTF-8
    with io.TextIOWrapper(text, encoding=encoding, errors="replace") as captured:
        try:
            with contextlib.redirect_stdout(captured):
                yield
        finally:
            captured.flush()
            sys.stdout.write(readable(text.getvalue().decode(encoding)))


def readable(text: str) -> str:
    """In the frame a replacement has the length of what it replaces."""
    usage, blank, text = text.partition("\n\n")
    text = f"{_type(usage)}{blank}{text}"
    text = re.sub(r"^([│ ] +--\S+ )(\S.*?  +)", lambda m: m[1] + _type(m[2]).ljust(len(m[2])), text, flags=re.M)
    return re.sub(r"\(default:(\s*(?:│\n│\s*)?)(?:None)?\)", lambda m: re.sub(r"[^│\n]", " ", m[0]), text)


def _type(shown: str) -> str:
    """{None}|INT -> N; {None,text,chat} -> {text,chat}; [STR [STR ...]] -> TEXT …; FLOAT FLOAT -> NUMBER NUMBER."""
    shown = re.sub(r"\{None\}\|", "", shown)
    shown = re.sub(r"\{None,", "{", shown)
    shown = re.sub(r"\[(\w+) \[\1 \.\.\.\]\]", r"\1 …", shown)
    return re.sub(r"\b[A-Z]+\b", lambda m: TYPES.get(m[0], m[0]), shown).rstrip()
