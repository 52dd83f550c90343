"""The one exception for mistakes the user can mend."""


class UserError(Exception):
    """Something the user asked for cannot be done. The text says what was wrong, where, and what to do.

    The command line prints it without a traceback and exits with 1.
    """
