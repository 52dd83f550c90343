"""Messages to the user while a command runs."""

import contextlib
import sys

from tqdm import tqdm


def log(text: str) -> None:
    """Print a line on stderr, above the progress bar if there is one."""
    with contextlib.suppress(OSError):  # a full disk or a closed pipe behind stderr must not stop the run
        tqdm.write(text, file=sys.stderr)
