"""Fixture of an S3 server on this machine. Tests load this module with `pytest_plugins`."""

import logging
import socket
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """Start an S3 server on the loopback interface. Environment variables tell fsspec its address."""
    pytest.importorskip("s3fs", reason="s3fs is not installed; `make install` brings it")
    server = pytest.importorskip("moto.server", reason="moto is not installed; `make install` brings it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        filesystem = fsspec.filesystem("s3", use_listings_cache=False)
        filesystem.makedirs("bucket", exist_ok=True)
        yield filesystem
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    running.stop()
