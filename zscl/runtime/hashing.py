"""SHA-256 digests."""

import hashlib
from pathlib import Path


def sha256_of(*contents: bytes | str) -> str:
    """SHA-256 over the contents and their borders, in hexadecimal digits."""
    total = hashlib.sha256()
    for content in contents:
        content = content.encode() if isinstance(content, str) else content
        total.update(len(content).to_bytes(8))
        total.update(content)
    return total.hexdigest()


def sha256_of_file(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
