"""Errors a user can do something about. The command line prints them as one line and exits with 2."""


class UserError(Exception):
    """Says what happened, to what, and the next step."""


class TemporaryError(UserError):
    """What may pass: a process has ended, the kernel is busy, memory or descriptors are short."""
