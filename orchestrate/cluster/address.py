"""Address of a Ray cluster: read it from the configuration, and check with short timeouts that a GCS answers there.

The GCS (global control service) is the main process of a Ray cluster. If it does not answer, Ray itself would wait for
minutes or forever.
"""

import os
from urllib.parse import urlsplit

import grpc

from orchestrate.lifecycle.network import check_port
from schemas.compute import Compute
from schemas.errors import ErrorCode, InputError
from schemas.redaction import mask

ADDRESS_VARIABLE = "RAY_ADDRESS"
RPC_TIMEOUT_SECONDS = 10.0
# The first call of every Ray client to a GCS. It belongs to Ray's internal protocol, which may change. So a gRPC server
# that does not know the call (UNIMPLEMENTED) is accepted.
GET_CLUSTER_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId"
ACCEPTED_CODES = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED)
_EXPECTED = "expected HOST:PORT of a running cluster's GCS (port 6379 by default), or no address to start a local Ray"


def cluster_address(compute: Compute) -> str | None:
    """Return the address of the cluster to connect to, according to the rules of `ray.init`.

    Args:
        compute: The recipe's section `compute`. If its field `address` is empty or `auto`, the environment variable
            RAY_ADDRESS is used.

    Returns:
        `auto`, HOST:PORT or a URL; `None` if a local cluster is to be started.
    """
    address = compute.address
    if address in (None, "", "auto"):
        address = os.environ.get(ADDRESS_VARIABLE) or address
    return None if address in (None, "", "local") else address


class _GcsError(Exception):
    """No GCS answers at an address.

    Attributes:
        reason: Why the address is rejected. In the message for the user, this text follows the address.
        code: The code of the `InputError` for the user.
        hint: Advice, which ends the message for the user.
    """

    def __init__(self, reason: str, code: ErrorCode = ErrorCode.UNREACHABLE, hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.code, self.hint = reason, code, hint


def check_gcs(address: str, field: str = "compute.address") -> None:
    """Check that the GCS of a Ray cluster answers at an address.

    Args:
        address: An address that `ray.init` accepts.
        field: The recipe field or environment variable that contains the address.

    Raises:
        InputError: The address is malformed, or no GCS answers at the address.
    """
    try:
        _check_gcs(address)
    except _GcsError as error:
        raise InputError(
            f"{field}: found no Ray cluster at {mask(address)}{error.reason}, {_EXPECTED}{error.hint}",
            code=error.code,
            field=field,
        ) from error


def _check_gcs(address: str) -> None:
    scheme, separator, rest = address.partition("://")
    if separator and scheme != "ray":
        hint = "; to submit a job to a dashboard, use zscl submit --address" if scheme in ("http", "https") else ""
        raise _GcsError(f": {scheme}:// is not the address of a GCS", ErrorCode.INVALID_VALUE, hint)
    target = rest if separator else _resolve(address)
    alias = f", which Ray resolves to {target}" if target != address and not separator else ""
    host, port = _split_host_and_port(target, alias)
    try:
        check_port(host, port)
    except OSError as error:
        raise _GcsError(f"{alias} ({error})") from error
    if not separator and os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        _call_gcs(target, alias)


def _resolve(address: str) -> str:
    """Return the HOST:PORT that Ray connects to.

    Args:
        address: `auto` for the cluster that runs on this machine, or HOST:PORT.

    Returns:
        The address, in which Ray has replaced localhost by this machine's IP address.

    Raises:
        _GcsError: No cluster runs on this machine, or the address is malformed.
    """
    from ray._private.services import canonicalize_bootstrap_address

    if address != "auto":
        _split_host_and_port(address)
    try:
        return str(canonicalize_bootstrap_address(address))
    except ConnectionError as error:
        raise _GcsError(": none runs on this machine", ErrorCode.NOT_FOUND) from error
    except (ValueError, OSError) as error:
        raise _GcsError(f" ({error})") from error


def _split_host_and_port(address: str, alias: str = "") -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{address}")
        host, port, path = parts.hostname, parts.port, parts.path
    except ValueError:
        host, port, path = None, None, ""
    if not host or not port or path or (address.count(":") > 1 and not address.startswith("[")):
        raise _GcsError(f"{alias}: it is not HOST:PORT ([HOST]:PORT for IPv6)", ErrorCode.INVALID_VALUE)
    return host, port


def _call_gcs(target: str, alias: str) -> None:
    """Call the GCS at an address as a Ray client does.

    Authentication errors are accepted, because they show that a GCS answers.

    Args:
        target: The address, HOST:PORT.
        alias: Text for the error message if `target` differs from the configured address; otherwise empty.

    Raises:
        _GcsError: No GCS answers.
    """
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(GET_CLUSTER_ID)(b"", timeout=RPC_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            if error.code() not in ACCEPTED_CODES:
                name = error.code().name
                raise _GcsError(f"{alias}: the server at this address is not a Ray GCS ({name})") from error
