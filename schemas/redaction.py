"""What nobody may read in a sentence, a file or a record: passwords and tokens, masked.

Three kinds of secrets are known: the password in a URL, the query parameters that sign or open one, and the values of
environment variables whose names end as those of secrets do. Rather too much is masked than too little.
"""

import os
import re
from collections.abc import Iterator
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus, unquote, unquote_plus

MASK = "***"
# AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, MLFLOW_TRACKING_PASSWORD, HF_TOKEN, ...
SECRET_VARIABLES = ("KEY", "TOKEN", "PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "CONNECTION_STRING")
SHORTEST = 8  # characters: what is shorter protects nothing, and would be masked out of ordinary words
SHORTEST_ALONE = 4  # of a password that stands on its own in a sentence about its URL

# Ends of the names of query parameters: X-Amz-Signature, X-Amz-Credential, X-Amz-Security-Token, access_token, ...
_SECRET_ENDS = (
    "signature", "credential", "token", "password", "passwd", "pwd", "secret", "key", "keyid", "key-pair-id",
    "odbc_connect",
)  # fmt: skip
_SECRET_PARAMETERS = ("sig", "pass", "auth", "authorization", "jwt", "code", "policy", "sas")

# A password may hold anything, unescaped too: it ends at the last @ before the next space.
_PASSWORD = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s/?#:@]*:)\S*@")
# A lone name before the @ of a web address is a token (elsewhere it names a container or an account).
_LONE_TOKEN = re.compile(r"(https?://)[^\s/?#:@]+@", flags=re.IGNORECASE)
_PARAMETER = re.compile(r"(?<=[?&;#])([^\s=&?;#\"<>]+)=([^\s&\"<>]*)")
_CLOSING = re.compile(r"[),.;:'\]}]*$")  # of the sentence around a URL

T = TypeVar("T")


def mask(text: str, *urls: str) -> str:
    """Mask every secret in a text.

    Args:
        text: any.
        urls: whose passwords may stand in the text on their own, as in the words of a library that took them apart.
    """
    for secret in sorted({*_of_environment(), *_passwords(urls)}, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return mask_urls(text)


def mask_urls(text: str) -> str:
    """Mask the secrets that URLs in a text hold; the same text gives the same on every machine."""
    text = _PASSWORD.sub(rf"\g<1>{MASK}@", text)
    text = _LONE_TOKEN.sub(rf"\g<1>{MASK}@", text)
    return _PARAMETER.sub(_masked_parameter, text)


def masked(content: T) -> T:
    """Mask every string of a tree of dicts, lists and tuples."""
    found: Any = content
    if isinstance(content, str):
        found = mask(content)
    elif isinstance(content, dict):
        found = {name: masked(value) for name, value in content.items()}
    elif isinstance(content, list | tuple):
        found = type(content)(map(masked, content))
    kept: T = found
    return kept


def _masked_parameter(found: re.Match[str]) -> str:
    name = unquote(found[1]).lower()
    if not found[2] or not (name in _SECRET_PARAMETERS or name.endswith(_SECRET_ENDS)):
        return found[0]
    closing = _CLOSING.search(found[2])
    return f"{found[1]}={MASK}{closing[0] if closing else ''}"


def _of_environment() -> Iterator[str]:
    # Not items(): another thread may remove a variable between its name and its value (requests does, for proxies).
    for name in os.environ:
        value = os.environ.get(name, "")
        if name.upper().endswith(SECRET_VARIABLES) and len(value) >= SHORTEST:
            yield from (value, quote(value, safe=""), quote_plus(value))


def _passwords(urls: tuple[str, ...]) -> Iterator[str]:
    for url in urls:
        before, at, _ = url.partition("://")[2].rpartition("@")
        _, colon, password = before.partition(":")
        if at and colon and len(password) >= SHORTEST_ALONE:
            yield from (password, unquote(password), unquote_plus(password))
