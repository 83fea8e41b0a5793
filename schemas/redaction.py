"""Masking of secrets (passwords, tokens, signatures) in messages, files and records.

Three kinds of secrets are masked: the password in a URL, the query parameters that sign or authorise a URL, and the
values of environment variables whose names end with one of SECRET_VARIABLES. In case of doubt, text is masked.
"""

import os
import re
from collections.abc import Iterator
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus, unquote, unquote_plus

MASK = "***"
# AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, MLFLOW_TRACKING_PASSWORD, HF_TOKEN, ...
SECRET_VARIABLES = ("KEY", "TOKEN", "PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "CONNECTION_STRING")
MIN_SECRET_LENGTH = 8  # characters: shorter values are not masked, because ordinary words may contain them
MIN_PASSWORD_LENGTH = 4  # characters: shorter passwords are masked only within their URL

# Ends of the names of query parameters: X-Amz-Signature, X-Amz-Credential, X-Amz-Security-Token, access_token, ...
_SECRET_ENDS = (
    "signature", "credential", "token", "password", "passwd", "pwd", "secret", "key", "keyid", "key-pair-id",
    "odbc_connect",
)  # fmt: skip
_SECRET_PARAMETERS = ("sig", "pass", "auth", "authorization", "jwt", "code", "policy", "sas")

# A password may contain any characters, even unescaped. It ends at the last @ before the next space.
_PASSWORD = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s/?#:@]*:)\S*@")
# A name without password before the @ of a web address is a token (in other schemes, a container or an account).
_LONE_TOKEN = re.compile(r"(https?://)[^\s/?#:@]+@", flags=re.IGNORECASE)
_PARAMETER = re.compile(r"(?<=[?&;#])([^\s=&?;#\"<>]+)=([^\s&\"<>]*)")
_TRAILING_PUNCTUATION = re.compile(r"[),.;:'\]}]*$")  # of the sentence that contains the URL

T = TypeVar("T")


def mask(text: str, *urls: str) -> str:
    """Mask every secret in a text.

    Args:
        text: Any text.
        urls: URLs whose passwords are masked wherever they occur in the text, even without the rest of the URL.

    Returns:
        The text with `***` in place of each secret.
    """
    for secret in sorted({*_environment_secrets(), *_passwords(urls)}, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return mask_urls(text)


def mask_urls(text: str) -> str:
    """Mask the secrets in the URLs of a text. Values of environment variables are not masked."""
    text = _PASSWORD.sub(rf"\g<1>{MASK}@", text)
    text = _LONE_TOKEN.sub(rf"\g<1>{MASK}@", text)
    return _PARAMETER.sub(_mask_parameter, text)


def mask_tree(content: T) -> T:
    """Mask the secrets in every string value of nested dicts, lists and tuples. Keys are not masked."""
    result: Any = content
    if isinstance(content, str):
        result = mask(content)
    elif isinstance(content, dict):
        result = {name: mask_tree(value) for name, value in content.items()}
    elif isinstance(content, list | tuple):
        result = type(content)(map(mask_tree, content))
    masked: T = result
    return masked


def _mask_parameter(match: re.Match[str]) -> str:
    name = unquote(match[1]).lower()
    if not match[2] or not (name in _SECRET_PARAMETERS or name.endswith(_SECRET_ENDS)):
        return match[0]
    punctuation = _TRAILING_PUNCTUATION.search(match[2])
    return f"{match[1]}={MASK}{punctuation[0] if punctuation else ''}"


def _environment_secrets() -> Iterator[str]:
    # items() would fail if another thread removes a variable during the iteration, as requests does for proxies.
    for name in os.environ:
        value = os.environ.get(name, "")
        if name.upper().endswith(SECRET_VARIABLES) and len(value) >= MIN_SECRET_LENGTH:
            yield from (value, quote(value, safe=""), quote_plus(value))


def _passwords(urls: tuple[str, ...]) -> Iterator[str]:
    for url in urls:
        before, at, _ = url.partition("://")[2].rpartition("@")
        _, colon, password = before.partition(":")
        if at and colon and len(password) >= MIN_PASSWORD_LENGTH:
            yield from (password, unquote(password), unquote_plus(password))
