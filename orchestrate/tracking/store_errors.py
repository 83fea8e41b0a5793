"""Errors of an MLflow store, each explained by its own cause, with what to do about it."""

import re
from collections.abc import Iterator
from http import HTTPStatus
from http.client import responses
from importlib.metadata import version
from importlib.resources import files
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from sqlalchemy.exc import SQLAlchemyError

from schemas.errors import InputError
from schemas.redaction import mask

FAILURES = (MlflowException, SQLAlchemyError, OSError, ImportError)  # of a tracking store that does not answer
OFFLINE = "; or run with --offline and send everything later with zscl sync"
LONGEST_REASON = 600  # characters: a server may answer with a whole page

_STATUS = re.compile(r"failed with error code (\d{3})|too many (\d{3}) error responses")
_SCHEMA = re.compile(r"database schema \(found version (\w+), but expected (\w+)\)")
_BODY = re.compile(r"Response body: '(.*)'", flags=re.DOTALL)
_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/.*)?")
# What installs a database driver that SQLAlchemy does not find.
_DRIVERS = {
    "psycopg": "zscl[postgres]", "psycopg2": "psycopg2-binary", "pymysql": "pymysql", "MySQLdb": "mysqlclient",
    "pyodbc": "pyodbc", "pymssql": "pymssql",
}  # fmt: skip


class ArtifactError(Exception):
    """The store took metrics and status, but not the files. The message is a sentence for the user."""


def artifact_error(uri: str, location: str, error: Exception) -> ArtifactError:
    """Explain why an artefact store did not take a file.

    Args:
        uri: Of the tracking store.
        location: Where the run's artefacts belong, as the tracking store says.
        error: What the upload raised.
    """
    scheme = urlsplit(location).scheme
    cause = reason_of(error, uri, location)
    if isinstance(error, ImportError):
        advice = "install the library that it needs"
    elif scheme in ("", "file") and uri.startswith(("http://", "https://")):
        advice = (
            "the server passes on a path of its own: start it with --serve-artifacts and --artifacts-destination, or "
            "mount that path here, writable"
        )
    elif scheme in ("", "file"):
        advice = "make that folder writable, or set tracking.experiment to a new name, whose files lie elsewhere"
    elif scheme in ("http", "https", "mlflow-artifacts"):
        advice = "see the server's log, and its --artifacts-destination"
    else:
        advice = "check its address, and the credentials for it in the environment of this process"
    return ArtifactError(
        f"the MLflow store at {mask(uri)} has the metrics, but its artefact store at {mask(location)} did not take the "
        f"files ({cause}); {advice}"
    )


def store_error(uri: str, error: Exception, advice: str = "") -> InputError:
    """Explain why a tracking store could not be used.

    Args:
        uri: Of the store.
        error: One of `FAILURES`, or an `InputError`, whose sentence is kept.
        advice: The end of the sentence: what else to do.
    """
    if isinstance(error, InputError):
        return InputError(f"{error}{advice}")
    explain = _explain_http if uri.startswith(("http://", "https://")) else _explain_database
    sentence = _explain_uri(uri, error) or explain(uri, error, reason_of(error, uri))
    return InputError(f"{sentence}{advice}")


def reason_of(error: Exception, *urls: str) -> str:
    """The innermost cause of an error, in one line, without secrets.

    Args:
        error: Any.
        urls: Whose passwords may stand in the text on their own.
    """
    inner: BaseException = error
    chain = list(_chain(error))
    if database := [each for each in chain if isinstance(each, SQLAlchemyError)]:  # MLflow raises its own from it
        inner = getattr(database[0], "orig", None) or database[0]
    elif any(type(each).__module__.startswith("requests") for each in chain):
        inner = chain[-1]
    text = " ".join(str(inner).split()) or type(inner).__name__
    text = text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} …"
    return mask(text if isinstance(inner, MlflowException) else f"{type(inner).__name__}: {text}", *urls)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _explain_uri(uri: str, error: Exception) -> str | None:
    """A sentence about a URI that no store can have, or about a library that is missing for it."""
    scheme, found = uri.partition("://")[0].partition("+")[0], f"tracking.uri: found {mask(uri)}"
    if isinstance(error, ModuleNotFoundError) and error.name in _DRIVERS:
        return f"{found}, whose driver {error.name} is not installed, expected it: pip install '{_DRIVERS[error.name]}'"
    if "maintenance mode" in str(error):
        return (
            f"{found}, a folder of MLflow's file store, which MLflow {version('mlflow')} does not use any more; "
            "expected sqlite:///FILE or a server (mlflow migrate-filestore converts a folder; "
            "MLFLOW_ALLOW_FILE_STORE=true uses it as it is)"
        )
    if scheme in ("http", "https"):
        try:
            named = urlsplit(uri).hostname is not None and urlsplit(uri).port != 0
        except ValueError:  # a port that is no number
            named = False
        return None if named else f"{found}, expected http://HOST:PORT"
    if type(error).__name__.startswith("Unsupported") or type(error).__name__ == "ArgumentError":
        meant = (
            f"http://{uri}" if _HOST_AND_PORT.fullmatch(uri) else "http://HOST:PORT, sqlite:///FILE or postgresql://…"
        )
        return f"{found}, which names no MLflow store, expected {meant}"
    return None


def _explain_http(uri: str, error: Exception, cause: str) -> str:
    """A sentence about a server: who did not let the request through, or what it answered."""
    kinds, text = {type(each).__name__ for each in _chain(error)}, str(error)
    host, shown, route = urlsplit(uri).hostname, mask(uri), _proxy(uri)
    status = next((int(a or b) for a, b in _STATUS.findall(text)), None)
    if status is None and type(error).__name__ == "RestException":
        status = error.get_http_status_code()  # type: ignore[attr-defined]
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED or "ProxyError" in kinds:
        return (
            f"tracking.uri: found no way to {shown} through the proxy {route or 'of HTTP_PROXY'} ({cause}); expected a "
            f"proxy that passes it on, or NO_PROXY={host} to go around it"
        )
    if "WRONG_VERSION_NUMBER" in text:
        return f"tracking.uri: found {shown}, where no TLS is spoken ({cause}), expected http:// instead of https://"
    if "SSLError" in kinds:
        return (
            f"tracking.uri: found a server at {shown} whose certificate is not trusted ({cause}), expected "
            "MLFLOW_TRACKING_SERVER_CERT_PATH to name the file of the authority that signed it"
        )
    through = f" through the proxy {route} (NO_PROXY={host} goes around it)" if route else ""
    # MLflow itself says in JSON that something is not found, and sends nobody elsewhere, as to a page for signing in.
    elsewhere = status is not None and (300 <= status < 400 or (status == HTTPStatus.NOT_FOUND and _BODY.search(text)))
    if elsewhere or (status is None and "not in a valid JSON format" in text):
        return (
            f"tracking.uri: found no MLflow server at {shown}{through}, but something else that answers "
            f"({status or 200}), expected the address of `mlflow server`, with its path prefix if it has one"
        )
    if status is None:
        return (
            f"tracking.uri: found no reachable MLflow store at {shown}{through} ({cause}), expected a server that "
            "answers"
        )
    return _explain_status(status, f"{shown}{through}", host, text)


def _explain_status(status: int, shown: str, host: str | None, text: str) -> str:
    """A sentence about the status that a server answers with."""
    body = _BODY.search(text)
    words = " ".join((body[1] if body else text).split())[:LONGEST_REASON]
    name = responses.get(status, "")
    if status == HTTPStatus.UNAUTHORIZED:
        return (
            f"tracking.uri: found that {shown} asks who you are (401), expected MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, with values that it knows"
        )
    if status == HTTPStatus.FORBIDDEN and "host header" in text.lower():
        return (
            f"tracking.uri: found that the server at {shown} refuses requests to the host name {host} (403: {words}), "
            f"expected it to be started with --allowed-hosts {host} (or MLFLOW_SERVER_ALLOWED_HOSTS)"
        )
    if status == HTTPStatus.FORBIDDEN:
        return (
            f"tracking.experiment: found no permission to write it at {shown} (403: {words}), expected an experiment "
            "that this user may edit (tracking.experiment), or the permission from who runs the server"
        )
    if status in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND):
        return f"tracking: found that {shown} refuses a request ({status}: {words}), expected it to be taken"
    return f"tracking.uri: found a server at {shown} that fails ({status} {name}), expected one that works; see its log"


def _explain_database(uri: str, error: Exception, cause: str) -> str:
    """A sentence about a database, or about what it refuses."""
    shown = mask(uri)
    if schema := _SCHEMA.search(str(error)):
        found, expected = schema.groups()
        versions = files("mlflow.store.db_migrations") / "versions"
        older = any(each.name.startswith(f"{found}_") for each in versions.iterdir())
        way_out = (
            f"make a copy of it, then: mlflow db upgrade {shown}"
            if older
            else f"use the version of MLflow that made it (this is {version('mlflow')}), or another store"
        )
        return (
            f"tracking.uri: found the database {shown} with the schema {found} of "
            f"{'an older' if older else 'a newer or another'} MLflow, expected {expected}; {way_out}"
        )
    if "xperiment name" in str(error) or "'name' exceeds" in str(error):
        return f"tracking.experiment: found a name that MLflow does not take ({cause}), expected another one"
    if not any(isinstance(each, OSError | ImportError | SQLAlchemyError) for each in _chain(error)):
        return f"tracking.uri: found that the MLflow store at {shown} refuses a request ({cause})"
    is_file = uri.startswith("sqlite")
    expected = "a file that can be read and written" if is_file else "a database that answers, and credentials for it"
    known = uri.partition("://")[0].partition("+")[0] in DATABASE_ENGINES
    return (
        f"tracking.uri: found no reachable MLflow store at {shown} ({cause}), expected "
        f"{expected if known else 'a server that answers or sqlite:///FILE'}"
    )


def _proxy(uri: str) -> str | None:
    """The proxy that requests to a server go through, without its password."""
    parts = urlsplit(uri)
    proxy = getproxies().get(parts.scheme)
    return None if proxy is None or proxy_bypass(parts.hostname or "") else mask(proxy)
