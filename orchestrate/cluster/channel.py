"""Event channel of a run: a Ray actor that transports the workers' events and the request to stop.

The process of the actor imports this module, so the module must not import torch and open_clip, which are slow to
import.
"""

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.util
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from schemas.errors import InputError

log = logging.getLogger(__name__)

DRAIN_SECONDS = 10.0  # how long to wait on exit for the remaining events
SEARCH_NAMESPACE = "zscl-searches"  # Ray's namespace for the channels of searches
_END = "end"


class RunChannel:
    """Ray actor that transports the workers' events to the driver, and the driver's request to stop to the workers."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[str] = asyncio.Queue()
        self._stop_requested = False
        self._input_error: InputError | None = None

    async def put(self, event: str) -> None:
        """Send an event to the driver."""
        await self._events.put(event)

    async def get(self) -> str:
        """Wait for the next event and return it."""
        return await self._events.get()

    async def report_input_error(self, error: InputError) -> None:
        """Store an error in the user's input that a worker found. The driver then does not restart the workers."""
        self._input_error = error

    async def input_error(self) -> InputError | None:
        """Return the error in the user's input that a worker reported; `None` if there is none."""
        return self._input_error

    async def request_stop(self) -> None:
        """Store the request that the workers stop at the next checkpoint. They poll `stop_requested`."""
        self._stop_requested = True

    async def stop_requested(self) -> bool:
        """Return whether `request_stop` was called."""
        return self._stop_requested


def create_channel(search: str | None = None) -> Any:
    """Create a channel whose actor runs on the Ray node of this process.

    Args:
        search: The name of the search that uses the channel; `None` for a run. `list_running_searches` returns it.

    Returns:
        The handle of a `RunChannel` actor.
    """
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    name = {} if search is None else {"name": f"{search} ({secrets.token_hex(4)})", "namespace": SEARCH_NAMESPACE}
    return ray.remote(RunChannel).options(num_cpus=0, scheduling_strategy=this_node, **name).remote()


def list_running_searches() -> list[str]:
    """Return the names of the searches that run on the cluster."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == SEARCH_NAMESPACE]


@contextmanager
def consume_events(channel: Any, on_event: Callable[[str], None]) -> Iterator[None]:
    """Context manager: call a callback in a thread for each event of a channel. On exit, kill the channel's actor.

    Exceptions of the callback are logged, so that an error of a display does not stop the training.

    Args:
        channel: The handle of a `RunChannel` actor.
        on_event: Called with each event: the string that was passed to `RunChannel.put`.
    """

    def consume() -> None:
        while (event := ray.get(channel.get.remote())) != _END:
            try:
                on_event(event)
            except Exception:
                log.exception("An event could not be shown; the run continues")

    thread = threading.Thread(target=consume, name="consume-events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with suppress(ray.exceptions.RayError):
            ray.get(channel.put.remote(_END), timeout=DRAIN_SECONDS)
            thread.join(DRAIN_SECONDS)
            ray.kill(channel)
