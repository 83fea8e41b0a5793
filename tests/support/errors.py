"""Assertions about `InputError`."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from schemas.errors import ErrorCode, InputError


@contextmanager
def refused(code: ErrorCode, field: str | None = None) -> Iterator[pytest.ExceptionInfo[InputError]]:
    """Context manager: assert that the block raises an `InputError` with this code and field.

    Args:
        code: The expected code.
        field: The expected field; `None` accepts any.

    Yields:
        The exception info, for more assertions after the block.
    """
    with pytest.raises(InputError) as info:
        yield info
    assert info.value.code == code, f"found the code {info.value.code}: {info.value}"
    if field is not None:
        assert info.value.field == field, f"found the field {info.value.field!r}: {info.value}"
