"""The line between the workers of a run and the process that watches it.

In a module of its own: it is an actor, whose process would import all that `train` does before anything is trained.
"""

import asyncio


class Line:
    """Progress one way, the wish to stop the other."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[str] = asyncio.Queue()
        self._stop = False

    async def put(self, message: str) -> None:
        """Send a message to the process that watches."""
        await self._messages.put(message)

    async def get(self) -> str:
        """Wait for the next message."""
        return await self._messages.get()

    async def ask_to_stop(self) -> None:
        """Have the workers stop where they can go on."""
        self._stop = True

    async def asked_to_stop(self) -> bool:
        """Tell a worker whether to stop."""
        return self._stop
