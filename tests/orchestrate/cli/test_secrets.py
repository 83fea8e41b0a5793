"""A run gets secrets in every supported way; none is in its output, files, MLflow records or error messages."""

import http.server
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from ruamel.yaml import YAML
from support.command import Command
from support.data import coloured_images, make_task

from zscl.data.tar import write_shards

SECRETS = {
    "password": "p%40ss-w0rd/of#url",
    "signature": "5ignature0f0ne",
    "token": "hf_0123456789abcdef",
    "key": "aws/secret+key/0123456789",
}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, whatever the query of the URL."""

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """A folder of data behind a web address."""
    make_task(tmp_path / "served/task", seed=0, train=8, test=4, shard_images=4)
    shard = tmp_path / "served/task/test/0.tar"
    shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\x00PNG", 1))
    images = [image for image, _ in coloured_images(6, 9)]
    write_shards(tmp_path / "served", ({"png": image, "txt": b"a thing"} for image in [*images, b"no image"]), 10)
    handler = partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("HF_TOKEN", SECRETS["token"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS["key"])
    return SECRETS


def assert_none_in(secrets: dict[str, str], *texts: str | bytes) -> None:
    for name, secret in secrets.items():
        for text in texts:
            assert (secret if isinstance(text, str) else secret.encode()) not in text, name


def test_no_secret_in_output_files_and_mlflow(
    secrets: dict[str, str],
    served: str,
    recipe: Callable[..., dict[str, Any]],
    zscl: Callable[..., Command],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray_cluster: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    signed = f"http://{served}/0.tar?X-Amz-Credential=me&X-Amz-Signature={secrets['signature']}"
    (tmp_path / "captions.txt").write_text("a thing\nanother thing\n")
    content = recipe(
        tasks=[{"path": f"http://me:{secrets['token']}@{served}/task", "name": "task"}],
        reference={"images": signed, "texts": "captions.txt"},
        compute={"device": "cpu", "max_broken_share": 0.9},
    )
    content["optimisation"]["steps"] = 3
    YAML(typ="safe").dump(content, tmp_path / "recipe.yaml")
    found = zscl("run", "recipe.yaml", "--out", "runs/mine", "--json")
    assert found.code == 0, found.error
    assert "skipped http://me:***@" in found.error
    assert f"skipped http://{served}/0.tar?X-Amz-Credential=***&X-Amz-Signature=***: sample" in found.error
    result = (tmp_path / "runs/mine/result.json").read_text()
    assert f"http://me:***@{served}/task" in result
    [run] = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").search_runs(["1"], "tags.`zscl.level` = 'sequence'")
    assert "X-Amz-Signature=***" in run.data.params["reference.images"]
    left = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert {"result.json", "experiment.yaml", "mlflow.db", "accuracy.json"} <= {file.name for file in left}
    assert_none_in(secrets, found.out, found.error, *map(str, left), *(file.read_bytes() for file in left))
    found = zscl("run", "recipe.yaml", "--dry-run")
    assert_none_in(secrets, found.out, found.error)


@pytest.mark.parametrize(
    "changes",
    [
        {"tracking": {"uri": "http://me:{password}@127.0.0.1:9"}},
        {"tracking": {"uri": "nonsense+x://me:{password}@host/x?token={signature}"}},
        {"tasks": ["http://me:{password}@127.0.0.1:9/task"]},
        {"tasks": ["file:///nowhere?sig={signature}&x={token}"]},
        {"reference": "http://127.0.0.1:9/0.tar?X-Amz-Signature={signature}"},
        {"reference": {"images": "nonsense://me:{password}@x/*.tar", "texts": "file:///nowhere?key={signature}"}},
        {"model": {"name": "ViT-B-32", "pretrained": "/nowhere/{key}.pt"}},
        {"compute": {"address": "ray://me:{password}@127.0.0.1:1", "device": "{token}"}},
        {"name": "{key}", "sed": "{token}"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_no_secret_in_error_messages(
    secrets: dict[str, str],
    changes: dict[str, Any],
    recipe: Callable[..., dict[str, Any]],
    zscl: Callable[..., Command],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray_cluster: None,
) -> None:
    monkeypatch.chdir(tmp_path)

    def filled(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {name: filled(value) for name, value in tree.items()}
        return [filled(each) for each in tree] if isinstance(tree, list) else tree.format(**secrets)

    YAML(typ="safe").dump(recipe(**filled(changes)), tmp_path / "recipe.yaml")
    found = zscl("run", "recipe.yaml", "--out", "runs/mine")
    assert found.code == 2, found.error
    assert found.error.startswith("error: ")
    assert_none_in(secrets, found.out, found.error)


def test_no_secret_in_the_traceback_of_an_internal_error(
    secrets: dict[str, str], zscl: Callable[..., Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise KeyError(f"http://me:{secrets['password']}@host {secrets['token']}")

    monkeypatch.setattr("orchestrate.runs.run.load_variants", fail)
    found = zscl("run", "recipe.yaml")
    assert found.code == 1
    assert "Traceback (most recent call last)" in found.error
    assert "KeyError: 'http://me:***@host ***'" in found.error
    assert_none_in(secrets, found.out, found.error)
