"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the caller can put right: a path, a key, a value.

    The message names the thing, says what is wrong with it and how to mend it, in one line.
    Command lines print it without a traceback and exit with `EXIT_CODE`.
    """

    EXIT_CODE = 2


class CorruptSample(UserError):
    """One sample that cannot be used, in a shard that otherwise can; the message names shard and key."""
