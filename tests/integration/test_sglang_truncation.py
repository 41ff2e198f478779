"""A real SGLang server that samples from a part of the vocabulary: what it says of that part."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ctpo_megatron.errors import EngineRefused
from ctpo_megatron.types import WHOLE, Truncation
from tests.support.engines import RunningServer, in_flight, load_reference
from tests.support.publishing import END_OF_TURN, PROMPT, check_against, publishing
from tests.support.truncation import check_supports

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

CUTS = [
    Truncation(top_k=5),
    Truncation(top_p=0.7, top_k=60),
    Truncation(top_k=60, min_p=0.1),
    Truncation(top_p=0.9, top_k=20, min_p=0.02),
]


def test_truncated_sampling(server: RunningServer, qwen3: Path) -> None:
    """Supports are what was cut to, log-probs are among them, in one batch with whole distributions and over an abort."""

    async def scenario() -> None:
        model = load_reference(qwen3)
        options = {"temperature": 0.7, "stop_token_ids": [END_OF_TURN]}
        async with publishing(server, model) as (client, publisher):
            await publisher.publish(13)
            running = [
                asyncio.create_task(client.generate(PROMPT, max_new_tokens=300, truncation=cut, session=n, recorded=0, **options))
                for n, cut in enumerate([*CUTS, WHOLE])
            ]
            await in_flight(server.url, server.api_key, running=3)
            await client.interrupt()  # parts are in; the rest is asked for anew
            client.go_on()
            generations = await asyncio.gather(*running)
            for generation, cut in zip(generations, CUTS, strict=False):
                check_supports(model, PROMPT, generation, 0.7, cut)
                assert generation.supports.counts.max() > 1
            assert generations[-1].supports is None
            check_against(model, generations[-1], 0.7)
            evaluated = await client.generate(PROMPT, max_new_tokens=20, truncation=CUTS[0], session=0, **options)
            assert evaluated.supports is None
            check_against(model, evaluated, 0.7)  # of the whole distribution: SGLang does not renormalise
            # should this not fail any more, rollout.top_p and min_p need no top_k
            with pytest.raises(EngineRefused, match="finite 1 < top_k"):
                await client.generate(
                    PROMPT, max_new_tokens=2, truncation=Truncation(top_p=0.9), session=0, recorded=0, **options
                )

    asyncio.run(scenario())
