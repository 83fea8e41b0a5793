"""What a command line left behind."""


class Command:
    """What a command line left behind."""

    def __init__(self, code: int, out: str, error: str) -> None:
        self.code, self.out, self.error = code, out, error
