"""An episode whose troubles are heard by whoever waits for its agent: an agent only sees that a request failed."""

from __future__ import annotations

import asyncio

from ctpo_megatron.agents.protocols import AgentAnswer, AgentRequest, Episode, EpisodeOver, RequestUnusable


class Overseen:
    """`episode`, as before. `trouble` is set to the first error that is neither the agent's nor the attempt's."""

    def __init__(self, episode: Episode) -> None:
        self._episode = episode
        self.trouble: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def complete(self, request: AgentRequest) -> AgentAnswer:
        """Implement Episode.complete."""
        try:
            return await self._episode.complete(request)
        except (EpisodeOver, RequestUnusable):
            raise
        except Exception as error:
            if not self.trouble.done():
                self.trouble.set_result(error)
            raise
