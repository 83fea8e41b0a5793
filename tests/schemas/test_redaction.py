"""What is masked, and what is not."""

import os
import sys
import threading
from collections.abc import Iterator

import pytest

from schemas.errors import InputError
from schemas.redaction import mask, mask_tree, mask_urls


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("http://me:s%40cret%2F@host:5000/", "http://me:***@host:5000/"),
        ("at http://me:p@ss/w#r?d:x&=@host:5000, expected", "at http://me:***@host:5000, expected"),
        ("redis://:secret@host", "redis://:***@host"),
        ("mysql+pymysql://me:secret@host/db?ssl_key=x", "mysql+pymysql://me:***@host/db?ssl_key=***"),
        ("https://ghp_0123@host/x", "https://***@host/x"),
        (
            "https://host/0.tar?X-Amz-Algorithm=A&X-Amz-Credential=K%2F1&X-Amz-Date=1&X-Amz-Security-Token=T&"
            "X-Amz-SignedHeaders=host&X-Amz-Signature=abc: found",
            "https://host/0.tar?X-Amz-Algorithm=A&X-Amz-Credential=***&X-Amz-Date=1&X-Amz-Security-Token=***&"
            "X-Amz-SignedHeaders=host&X-Amz-Signature=***: found",
        ),
        ("(https://host/0.tar?sv=1&sig=a%3D)", "(https://host/0.tar?sv=1&sig=***)"),
        ("'https://host/0.tar?AWSAccessKeyId=A&Signature=B'", "'https://host/0.tar?AWSAccessKeyId=***&Signature=***'"),
        ("https://host/x?X%2DAmz%2DSignature=abc", "https://host/x?X%2DAmz%2DSignature=***"),
        ("https://host/x#access_token=abc", "https://host/x#access_token=***"),
        ("https://host/x?password=a&api_key=b&TOKEN=c&page=3", "https://host/x?password=***&api_key=***&TOKEN=***&page=3"),
    ],
)  # fmt: skip
def test_secrets_of_urls_are_masked(text: str, shown: str) -> None:
    assert mask(text) == shown
    assert mask(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////data/mlflow.db",
        "http://localhost:5000",
        "s3://bucket/task@2/train/{0..9}.tar",
        "abfs://container@account.dfs.core.windows.net/train",
        "https://host/x?page=3&size=10",
        "tasks.0: unknown field 'pth'; did you mean 'path'?",
    ],
)
def test_what_is_no_secret_is_left(text: str) -> None:
    assert mask(text) == text


def test_values_of_secret_variables_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "HF_TOKEN",
        "RAY_AUTH_TOKEN",
    ):
        monkeypatch.setenv(name, f"of/{name}+=")
        assert mask(f"found of/{name}+= and of%2F{name}%2B%3D") == "found *** and ***"
        assert mask_urls(f"found of/{name}+=") == f"found of/{name}+="  # the same on every machine
    monkeypatch.setenv("SORT_KEY", "name")
    assert mask("unknown field 'name'") == "unknown field 'name'"


def test_a_password_that_a_library_took_out_of_its_url_is_masked() -> None:
    assert mask("no user me with pässword!", "mysql://me:p%C3%A4ssword%21@host/db") == "no user me with ***"


def test_trees_are_masked_throughout() -> None:
    tree = {"a": ["x://u:secret@h", {"b": ("x://u:secret@h", 1, None)}]}
    assert mask_tree(tree) == {"a": ["x://u:***@h", {"b": ("x://u:***@h", 1, None)}]}


def test_a_sentence_of_ours_has_no_secret_in_it_and_steers_no_terminal() -> None:
    assert (
        str(InputError("x://u:secret@h: found \x1b[2J\x07\udcff,\nexpected")) == "x://u:***@h: found �[2J��,\nexpected"
    )


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_another_thread_may_change_the_environment_meanwhile(
    monkeypatch: pytest.MonkeyPatch, frequent_switches: None
) -> None:
    monkeypatch.setenv("STAYS_TOKEN", "a-secret-that-stays")
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            for number in range(20):
                os.environ[f"GOES_{number}_TOKEN"] = "a-secret-that-goes"
            for number in range(20):
                del os.environ[f"GOES_{number}_TOKEN"]

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert {mask("found a-secret-that-stays") for _ in range(300)} == {"found ***"}
    finally:
        ended.set()
        thread.join()
