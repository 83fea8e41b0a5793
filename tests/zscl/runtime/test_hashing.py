"""SHA-256 digests."""

import hashlib
from pathlib import Path

from zscl.runtime.hashing import sha256_of, sha256_of_file


def test_the_digest_depends_on_boundaries_between_contents() -> None:
    assert sha256_of("ab", "c") != sha256_of("a", "bc") != sha256_of("abc")
    assert sha256_of("\u00fc", b"x") == sha256_of("\u00fc".encode(), "x")
    assert sha256_of("a") == hashlib.sha256(b"\0\0\0\0\0\0\0\1a").hexdigest()


def test_digest_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()
