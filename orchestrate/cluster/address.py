"""The address of a Ray cluster that is named: checked within seconds, where Ray would wait for minutes or for ever."""

import os
from urllib.parse import urlsplit

import grpc

from orchestrate.lifecycle.network import check_port
from schemas.compute import Compute
from schemas.errors import InputError
from schemas.redaction import mask

ADDRESS = "RAY_ADDRESS"
ANSWER_SECONDS = 10.0
# What every Ray client asks a GCS first. The name belongs to Ray's own protocol, so a server that speaks gRPC but does
# not know it passes: another version of Ray is not refused.
CLUSTER_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId"
ANSWERS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED)


def named_address(compute: Compute) -> str | None:
    """The cluster that the recipe or the environment names, or None where a local one is to be started.

    As in `ray.init`: RAY_ADDRESS takes the place of no address, and of `auto`; `local` starts one.
    """
    address = compute.address
    if address in (None, "", "auto"):
        address = os.environ.get(ADDRESS) or address
    return None if address in (None, "", "local") else address


def check_gcs(address: str, field: str = "compute.address") -> None:
    """See that the head process of a Ray cluster, its GCS, answers at an address.

    Args:
        address: As `ray.init` takes it.
        field: Where the user gave it.

    Raises:
        InputError: It does not, and why.
    """
    found = f"{field}: found no Ray cluster at {mask(address)}"
    expected = "expected HOST:PORT of a running cluster's GCS (port 6379 by default), or none to start one here"
    scheme, separator, rest = address.partition("://")
    if separator and scheme != "ray":
        hint = "; jobs go to a dashboard: zscl submit --address" if scheme in ("http", "https") else ""
        raise InputError(f"{found}: {scheme}:// is no address of a GCS, {expected}{hint}")
    meant = rest if separator else _meant(address, found, expected)
    if meant != address and not separator:
        found += f", which is {meant} to Ray"
    host, port = _host_and_port(meant, found, expected)
    try:
        check_port(host, port)
    except OSError as error:
        raise InputError(f"{found} ({error}), {expected}") from error
    if not separator and os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        _check_service(meant, found, expected)


def _meant(address: str, found: str, expected: str) -> str:
    """The address that Ray connects to: the running cluster for `auto`, this node's own address for localhost."""
    from ray._private.services import canonicalize_bootstrap_address

    if address != "auto":
        _host_and_port(address, found, expected)
    try:
        return str(canonicalize_bootstrap_address(address))
    except ConnectionError as error:
        raise InputError(f"{found}: none runs on this machine, {expected}") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{found} ({error}), {expected}") from error


def _host_and_port(address: str, found: str, expected: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{address}")
        host, port, path = parts.hostname, parts.port, parts.path
    except ValueError:
        host, port, path = None, None, ""
    if not host or not port or path or (address.count(":") > 1 and not address.startswith("[")):
        raise InputError(f"{found}: it is not HOST:PORT ([HOST]:PORT for IPv6), {expected}")
    return host, port


def _check_service(target: str, found: str, expected: str) -> None:
    """Call a GCS. A refusal because the token is missing is an answer, too.

    Raises:
        InputError: what answers does not speak gRPC, or nothing answers in time.
    """
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(CLUSTER_ID)(b"", timeout=ANSWER_SECONDS)
        except grpc.RpcError as error:
            if error.code() not in ANSWERS:
                raise InputError(
                    f"{found}: something answers there, but not as a Ray GCS does ({error.code().name}), {expected}"
                ) from error
