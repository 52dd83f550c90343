"""The exception for mistakes that the user can correct."""


class UserError(Exception):
    """A request of the user cannot be carried out. The text says what was wrong, where, and what to do.

    The command line prints it without a traceback and exits with 1.
    """
