"""Exceptions whose message is meant for the user."""


class UserError(Exception):
    """An error that the caller can fix: a wrong path, key or value.

    The message is one line: where the error is (file, key), what is wrong, and how to fix it.
    Commands print it without a traceback and exit with `EXIT_CODE`.
    """

    EXIT_CODE = 2


class CorruptSample(UserError):
    """One unusable sample in an otherwise usable shard; the message names the shard and the sample's key."""
