"""The one exception that is the user's to read."""


class UserError(Exception):
    """Something the user of a command can put right: what was given, where, and what is wanted, in one line.

    The commands print it without a traceback and end with exit code 2.
    """
