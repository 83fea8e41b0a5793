"""Connection test of a TCP port, with a short timeout.

Use it before calling a client library that may wait for a connection for minutes or forever.
"""

import socket

CONNECT_SECONDS = 5.0


def check_port(host: str, port: int) -> None:
    """Check that a TCP port accepts connections.

    Args:
        host: A host name or an IP address.
        port: The port's number.

    Raises:
        OSError: The host does not exist, or refuses the connection.
        TimeoutError: There was no answer within `CONNECT_SECONDS`.
    """
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except TimeoutError as error:
        raise TimeoutError(f"no answer from {host}:{port} within {CONNECT_SECONDS:g} s") from error
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a label of a host name is empty or too long
        raise OSError(f"no host is named {host} ({error})") from error
