"""Whether something answers at an address, within seconds: libraries may wait for minutes, or for ever."""

import socket

CONNECT_SECONDS = 5.0


def check_port(host: str, port: int) -> None:
    """Connect to a TCP port.

    Raises:
        OSError: saying why that fails: no such host, refused, or no answer within `CONNECT_SECONDS`.
    """
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except TimeoutError as error:
        raise TimeoutError(f"no answer from {host}:{port} within {CONNECT_SECONDS:g} s") from error
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a label of a host name is empty or too long
        raise OSError(f"no host of the name {host} ({error})") from error
