"""Result of a command line that a test ran."""


class Command:
    """Exit code, standard output and standard error of a command line."""

    def __init__(self, code: int, out: str, error: str) -> None:
        self.code, self.out, self.error = code, out, error
