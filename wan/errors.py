"""The kinds of failure a user can see. Each becomes one line on stderr and an exit code."""

_MAX_LETTERS = 4_000


class SwanError(Exception):
    """A file, a device or the machine is at fault. Exit code 1; the message is one line."""

    exit_code = 1

    def __str__(self) -> str:
        """Printable and of bounded length: it may quote names that a file gave."""
        text = super().__str__()
        if len(text) > _MAX_LETTERS:
            text = f"{text[: _MAX_LETTERS // 2]} ... {text[-_MAX_LETTERS // 4 :]}"
        return printable(text)


class UsageError(SwanError):
    """The request itself is wrong. Exit code 2; the message says what is allowed."""

    exit_code = 2


class Cancelled(SwanError):
    """Whoever asked for a video does not want it any more."""


def one_line(error: BaseException) -> str:
    """The message of an exception on one line, printable; its type where it has no message."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def described(error: BaseException) -> str:
    """The same, with its type where it is none of these kinds."""
    return one_line(error) if isinstance(error, SwanError) else f"{type(error).__name__}: {one_line(error)}"


def printable(text: object) -> str:
    """A text or path with what a terminal would obey, or cannot show, escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))
