"""The line between the workers of a run and the process that watches it.

In a module of its own: it is an actor, whose process would import all that `train` does before anything is trained.
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

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 10.0  # of the workers, in the end
SEARCHES = "zscl-searches"  # Ray's namespace for actors of searches
_END = "end"


class RunChannel:
    """Progress one way, the wish to stop the other."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[str] = asyncio.Queue()
        self._stop = False
        self._refusal = ""

    async def put(self, message: str) -> None:
        """Send a message to the process that watches."""
        await self._messages.put(message)

    async def get(self) -> str:
        """Wait for the next message."""
        return await self._messages.get()

    async def refuse(self, sentence: str) -> None:
        """Say what is wrong with the input."""
        self._refusal = sentence

    async def refused(self) -> str:
        """What was wrong with the input, if anything was."""
        return self._refusal

    async def ask_to_stop(self) -> None:
        """Have the workers stop where they can go on."""
        self._stop = True

    async def asked_to_stop(self) -> bool:
        """Tell a worker whether to stop."""
        return self._stop


def open_channel(search: str | None = None) -> Any:
    """A line whose actor lives on this node.

    Args:
        search: Name of the search that it belongs to, by which others on the cluster learn of it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    named = {} if search is None else {"name": f"{search} ({secrets.token_hex(4)})", "namespace": SEARCHES}
    return ray.remote(RunChannel).options(num_cpus=0, scheduling_strategy=here, **named).remote()


def running_searches() -> list[str]:
    """The searches that are under way on the cluster, by name."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == SEARCHES]


@contextmanager
def consume_events(line: Any, hear: Callable[[str], None]) -> Iterator[None]:
    """Hand on what comes over a line, from a thread, until the block ends; then the line is gone.

    Nothing that goes wrong with a display may stop the training, or keep this process: it is logged.
    """

    def listen() -> None:
        while (message := ray.get(line.get.remote())) != _END:
            try:
                hear(message)
            except Exception:
                log.exception("Progress could not be shown; the run goes on")

    thread = threading.Thread(target=listen, name="listen", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with suppress(ray.exceptions.RayError):
            ray.get(line.put.remote(_END), timeout=LAST_WORDS_SECONDS)
            thread.join(LAST_WORDS_SECONDS)
            ray.kill(line)
