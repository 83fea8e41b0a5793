"""SHA-256 digests of texts, bytes and files."""

import hashlib
from pathlib import Path


def sha256_of(*contents: bytes | str) -> str:
    """Return one SHA-256 digest of several contents.

    Args:
        *contents: Bytes, or texts, which are encoded in UTF-8. The length of each content is hashed, too, so that the
            digest depends on the boundaries between the contents.

    Returns:
        The digest in hexadecimal digits.
    """
    total = hashlib.sha256()
    for content in contents:
        content = content.encode() if isinstance(content, str) else content
        total.update(len(content).to_bytes(8))
        total.update(content)
    return total.hexdigest()


def sha256_of_file(file: Path) -> str:
    """Return the SHA-256 digest of a file's content, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
