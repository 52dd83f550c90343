"""What the user is told on the way."""

import contextlib
import sys

from tqdm import tqdm


def log(text: str) -> None:
    """A line for the user on stderr, above the progress bar where there is one."""
    with contextlib.suppress(OSError):  # a full disk or a closed pipe behind stderr is no reason to stop
        tqdm.write(text, file=sys.stderr)
