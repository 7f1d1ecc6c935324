"""Make a video: python -m wan --help"""

from typing import NoReturn

from wan.command import run_process


def make() -> int:
    from wan.cli import main  # here, for a signal may come while it is imported

    return main()


def main() -> NoReturn:
    run_process(make)


if __name__ == "__main__":
    main()
