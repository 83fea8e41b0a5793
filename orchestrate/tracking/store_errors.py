"""Error messages for MLflow stores: they contain the cause in one sentence, and advice."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import responses
from importlib.metadata import version
from importlib.resources import files
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from sqlalchemy.exc import SQLAlchemyError

from schemas.errors import ErrorCode, InputError
from schemas.redaction import mask

FAILURES = (MlflowException, SQLAlchemyError, OSError, ImportError)  # raised if a tracking store cannot be used
OFFLINE_ADVICE = "; or run with --offline and send everything later with zscl sync"
MAX_REASON_LENGTH = 600  # in characters, because a server may answer with a complete HTML page

_STATUS = re.compile(r"failed with error code (\d{3})|too many (\d{3}) error responses")
_SCHEMA = re.compile(r"database schema \(found version (\w+), but expected (\w+)\)")
_BODY = re.compile(r"Response body: '(.*)'", flags=re.DOTALL)
_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/.*)?")
_URI, _EXPERIMENT = "tracking.uri", "tracking.experiment"  # recipe fields
_INVALID = ErrorCode.INVALID_VALUE
# The packages that provide database drivers, by the driver's module name.
_DRIVERS = {
    "psycopg": "zscl[postgres]", "psycopg2": "psycopg2-binary", "pymysql": "pymysql", "MySQLdb": "mysqlclient",
    "pyodbc": "pyodbc", "pymssql": "pymssql",
}  # fmt: skip


class ArtifactError(Exception):
    """The artifact store did not accept a run's files, after the tracking store accepted metrics and status.

    The message is intended for the user.
    """


def artifact_error(uri: str, location: str, error: Exception) -> ArtifactError:
    """Create the error for an artifact store that did not accept a file.

    Args:
        uri: Tracking URI.
        location: The run's artifact URI, which the tracking store records.
        error: The error that the upload raised.

    Returns:
        An error whose message contains the store, the cause and advice.
    """
    scheme = urlsplit(location).scheme
    cause = root_cause(error, uri, location)
    if isinstance(error, ImportError):
        advice = "install the missing library"
    elif scheme in ("", "file") and uri.startswith(("http://", "https://")):
        advice = (
            "the server returned a path on its own disk: start it with --serve-artifacts and --artifacts-destination, "
            "or mount that path here, writable"
        )
    elif scheme in ("", "file"):
        advice = (
            "make that folder writable, or set tracking.experiment to the name of a new experiment, whose files are "
            "in another folder"
        )
    elif scheme in ("http", "https", "mlflow-artifacts"):
        advice = "see the server's log, and its option --artifacts-destination"
    else:
        advice = "check its address, and the credentials for it in the environment of this process"
    return ArtifactError(
        f"the MLflow store at {mask(uri)} has the metrics, but its artifact store at {mask(location)} did not accept "
        f"the files ({cause}); {advice}"
    )


def store_error(uri: str, error: Exception, advice: str = "") -> InputError:
    """Create the error for a tracking store that cannot be used.

    Args:
        uri: Tracking URI.
        error: An exception of a type in `FAILURES`, or an `InputError`, whose message, code and field are copied.
        advice: Text that is appended to the message, including its leading punctuation.

    Returns:
        An error for the user.
    """
    if not isinstance(error, InputError):
        explain = _explain_http if uri.startswith(("http://", "https://")) else _explain_database
        error = _explain_uri(uri, error) or explain(uri, error, root_cause(error, uri))
    return InputError(f"{error}{advice}", code=error.code, field=error.field)


@contextmanager
def explain_store_errors(uri: str, advice: str = "") -> Iterator[None]:
    """Context manager: convert exceptions of the types in `FAILURES` to an `InputError` (see `store_error`)."""
    try:
        yield
    except (*FAILURES, InputError) as error:
        raise store_error(uri, error, advice) from error


def root_cause(error: Exception, *urls: str) -> str:
    """Describe the root cause of an error in one line, without secrets.

    Args:
        error: The error.
        urls: URLs with passwords. These passwords are masked wherever they occur in the text.

    Returns:
        The cause's type and message.
    """
    cause: BaseException = error
    chain = list(_cause_chain(error))
    # MLflow wraps SQLAlchemy's errors.
    if database_errors := [link for link in chain if isinstance(link, SQLAlchemyError)]:
        cause = getattr(database_errors[0], "orig", None) or database_errors[0]
    elif any(type(link).__module__.startswith("requests") for link in chain):
        cause = chain[-1]
    text = " ".join(str(cause).split()) or type(cause).__name__
    text = text if len(text) <= MAX_REASON_LENGTH else f"{text[:MAX_REASON_LENGTH]} …"
    return mask(text if isinstance(cause, MlflowException) else f"{type(cause).__name__}: {text}", *urls)


def _cause_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an error and its causes, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _input_error(code: ErrorCode, field: str, text: str) -> InputError:
    return InputError(f"{field}: {text}", code=code, field=field)


def _explain_uri(uri: str, error: Exception) -> InputError | None:
    """Explain an invalid URI or a missing library. Return `None` if the error has another cause."""
    scheme, shown = uri.partition("://")[0].partition("+")[0], mask(uri)
    if isinstance(error, ModuleNotFoundError) and error.name in _DRIVERS:
        package = _DRIVERS[error.name]
        text = f"the driver {error.name} of {shown} is not installed; run: pip install '{package}'"
        return _input_error(ErrorCode.MISSING_PACKAGE, _URI, text)
    if "maintenance mode" in str(error):
        text = (
            f"found {shown}, a folder of MLflow's file store, which MLflow {version('mlflow')} no longer supports; "
            "expected sqlite:///FILE or a server (mlflow migrate-filestore converts a folder; "
            "MLFLOW_ALLOW_FILE_STORE=true uses it without conversion)"
        )
        return _input_error(ErrorCode.UNSUPPORTED, _URI, text)
    if scheme in ("http", "https"):
        try:
            is_valid = urlsplit(uri).hostname is not None and urlsplit(uri).port != 0
        except ValueError:  # the port is not a number
            is_valid = False
        return None if is_valid else _input_error(_INVALID, _URI, f"found {shown}, expected http://HOST:PORT")
    if type(error).__name__.startswith("Unsupported") or type(error).__name__ == "ArgumentError":
        expected = (
            f"http://{uri}" if _HOST_AND_PORT.fullmatch(uri) else "http://HOST:PORT, sqlite:///FILE or postgresql://…"
        )
        return _input_error(
            _INVALID, _URI, f"found {shown}, which is not the URI of an MLflow store, expected {expected}"
        )
    return None


def _explain_http(uri: str, error: Exception, cause: str) -> InputError:
    """Explain a failed request to a server: no server was reached, or the server returned an error."""
    kinds, text = {type(link).__name__ for link in _cause_chain(error)}, str(error)
    host, shown, proxy = urlsplit(uri).hostname, mask(uri), _proxy(uri)
    status = next((int(a or b) for a, b in _STATUS.findall(text)), None)
    if status is None and type(error).__name__ == "RestException":
        status = error.get_http_status_code()  # type: ignore[attr-defined]
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED or "ProxyError" in kinds:
        message = (
            f"found no connection to {shown} through the proxy {proxy or 'of HTTP_PROXY'} ({cause}); expected a proxy "
            f"that forwards it, or NO_PROXY={host} to bypass it"
        )
        return _input_error(ErrorCode.UNREACHABLE, _URI, message)
    if "WRONG_VERSION_NUMBER" in text:
        message = f"found {shown}, which does not use TLS ({cause}), expected http:// instead of https://"
        return _input_error(ErrorCode.UNREACHABLE, _URI, message)
    if "SSLError" in kinds:
        message = (
            f"found a server at {shown} whose certificate is not trusted ({cause}), expected "
            "MLFLOW_TRACKING_SERVER_CERT_PATH to be the certificate file of the authority that signed it"
        )
        return _input_error(ErrorCode.UNREACHABLE, _URI, message)
    through = f" through the proxy {proxy} (NO_PROXY={host} bypasses it)" if proxy else ""
    # MLflow's own 404 has a JSON body, and MLflow never redirects, for example to a login page.
    is_other_server = status is not None and (
        300 <= status < 400 or (status == HTTPStatus.NOT_FOUND and _BODY.search(text))
    )
    if is_other_server or (status is None and "not in a valid JSON format" in text):
        message = (
            f"found no MLflow server at {shown}{through}, but another server ({status or 200}), expected the address "
            "of `mlflow server`, with its path prefix if it has one"
        )
        return _input_error(ErrorCode.UNREACHABLE, _URI, message)
    if status is None:
        message = f"found no reachable MLflow store at {shown}{through} ({cause}), expected a server that answers"
        return _input_error(ErrorCode.UNREACHABLE, _URI, message)
    return _explain_status(status, f"{shown}{through}", host, text)


def _explain_status(status: int, shown: str, host: str | None, text: str) -> InputError:
    """Explain the HTTP status that an MLflow server returned."""
    body = _BODY.search(text)
    answer = " ".join((body[1] if body else text).split())[:MAX_REASON_LENGTH]
    field = _URI
    if status == HTTPStatus.UNAUTHORIZED:
        message = (
            f"{shown} requires authentication (401), expected valid values of MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or of MLFLOW_TRACKING_TOKEN"
        )
    elif status == HTTPStatus.FORBIDDEN and "host header" in text.lower():
        message = (
            f"the server at {shown} rejects requests to the host name {host} (403: {answer}). Start the server with "
            f"--allowed-hosts {host} (or MLFLOW_SERVER_ALLOWED_HOSTS)"
        )
    elif status == HTTPStatus.FORBIDDEN:
        field = _EXPERIMENT
        message = (
            f"this user may not write the experiment at {shown} (403: {answer}). Set tracking.experiment to an "
            "experiment that this user may edit, or ask the server's administrator for permission"
        )
    elif status in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND):
        field = "tracking"
        message = f"the MLflow server at {shown} rejects a request ({status}: {answer})"
    else:
        name = responses.get(status, "")
        message = f"found a server at {shown} that fails ({status} {name}), expected one that works; see its log"
    return _input_error(ErrorCode.REJECTED, field, message)


def _explain_database(uri: str, error: Exception, cause: str) -> InputError:
    """Explain an error of a database, or of MLflow when it uses the database."""
    shown = mask(uri)
    if schema := _SCHEMA.search(str(error)):
        actual, expected = schema.groups()
        versions = files("mlflow.store.db_migrations") / "versions"
        is_older = any(file.name.startswith(f"{actual}_") for file in versions.iterdir())
        advice = (
            f"make a copy of it, then run: mlflow db upgrade {shown}"
            if is_older
            else f"use the version of MLflow that created it (this is {version('mlflow')}), or another store"
        )
        message = (
            f"found the database {shown} with the schema {actual} of "
            f"{'an older' if is_older else 'a newer or another'} MLflow, expected {expected}; {advice}"
        )
        return _input_error(ErrorCode.MISMATCH, _URI, message)
    if "xperiment name" in str(error) or "'name' exceeds" in str(error):
        message = f"MLflow does not accept this name ({cause}), expected another name"
        return _input_error(_INVALID, _EXPERIMENT, message)
    if not any(isinstance(link, OSError | ImportError | SQLAlchemyError) for link in _cause_chain(error)):
        return _input_error(ErrorCode.REJECTED, _URI, f"the MLflow store at {shown} rejects a request ({cause})")
    expected = "a server that answers or sqlite:///FILE"
    if uri.startswith("sqlite"):
        expected = "a file that can be read and written"
    elif uri.partition("://")[0].partition("+")[0] in DATABASE_ENGINES:
        expected = "a database that answers, and credentials for it"
    message = f"found no reachable MLflow store at {shown} ({cause}), expected {expected}"
    return _input_error(ErrorCode.UNREACHABLE, _URI, message)


def _proxy(uri: str) -> str | None:
    """Return the proxy for requests to a server, with its password masked; `None` if there is no proxy."""
    parts = urlsplit(uri)
    proxy = getproxies().get(parts.scheme)
    return None if proxy is None or proxy_bypass(parts.hostname or "") else mask(proxy)
