"""The two kinds of failure a user can see. Each becomes one line on stderr and an exit code."""


class SwanError(Exception):
    """A file, a device or the machine is at fault. Exit code 1; the message is one line."""

    exit_code = 1


class UsageError(SwanError):
    """The request itself is wrong. Exit code 2; the message says what is allowed."""

    exit_code = 2
