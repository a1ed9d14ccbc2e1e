"""Machines die under streams, again and again; every client reads one answer, once."""

import asyncio
import json
import random
from collections import Counter
from contextlib import AsyncExitStack

import aiohttp
import pytest

from support.coordinator import Running, running
from support.ollama import Hardware, StandIn

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

AGENTS, CLIENTS, KILLS, TOKENS = 4, 8, 200, 60
SPEED = Hardware(decode_tokens_per_second=300, reference_bytes=2_000_000_000)


class Reader:
    """Clients that read one stream after the other, and what came of it; `tokens` is what came."""

    def __init__(self, coordinator: Running, expected: dict[str, str]) -> None:
        self._coordinator = coordinator
        self._expected = expected
        self.outcomes: Counter[str] = Counter()
        self.tokens = 0
        self.over = asyncio.Event()

    async def read(self, number: int) -> None:
        while not self.over.is_set():
            prompt = f"question {number}"
            said = [{"role": "user", "content": prompt}]
            try:
                async with self._coordinator.stream(
                    messages=said, options={"num_predict": TOKENS}
                ) as response:
                    lines = [json.loads(line) async for line in response.content]
            except aiohttp.ClientError as exc:
                self.outcomes[f"cut: {exc!r}"] += 1
                continue
            if response.status != 200:
                self.outcomes[f"refused {response.status}"] += 1
                continue
            self._judge(prompt, lines)

    def _judge(self, prompt: str, lines: list[dict[str, object]]) -> None:
        *records, last = lines
        texts = [str(record["message"]["content"]) for record in records]  # type: ignore[index]
        text = "".join(texts)
        self.tokens += len(texts)
        if not self._expected[prompt].startswith(text):
            self.outcomes[f"wrong text: {text!r}, not {self._expected[prompt]!r}"] += 1
        elif "error" in last:
            self.outcomes["error record"] += 1
        elif len(texts) != TOKENS or last["eval_count"] != TOKENS:
            self.outcomes[f"lost count: {len(texts)} {last}"] += 1
        else:
            self.outcomes["continued" if "continued" in last else "whole"] += 1


@pytest.mark.spec("PROXY-46")
@pytest.mark.spec("PROXY-47")
async def test_no_text_comes_twice_and_no_count_is_lost() -> None:
    async with AsyncExitStack() as stack:
        coordinator = await stack.enter_async_context(running())
        nodes = [
            await stack.enter_async_context(StandIn(slots=4, hardware=SPEED)) for _ in range(AGENTS)
        ]
        for node in nodes:
            await coordinator.register(node)
            await node.load("llama3.2")
        expected = {}
        for number in range(CLIENTS):
            prompt = f"question {number}"
            messages = [{"role": "user", "content": prompt}]
            async with coordinator.session.post(
                f"{nodes[0].url}/api/chat",
                json={
                    "model": "llama3.2",
                    "messages": messages,
                    "stream": False,
                    "options": {"num_predict": TOKENS},
                },
            ) as response:
                expected[prompt] = (await response.json())["message"]["content"]
        reader = Reader(coordinator, expected)
        reading = [asyncio.create_task(reader.read(number)) for number in range(CLIENTS)]
        chance = random.Random(7)
        kills = 0
        while kills < KILLS:
            node = chance.choice(nodes)
            if node.seen.active:
                await node.kill(chance.choice(["fin", "rst"]))
                kills += 1
                await asyncio.sleep(chance.uniform(0.02, 0.2))
                await node.start()
            await asyncio.sleep(chance.uniform(0.0, 0.2))
        reader.over.set()
        await asyncio.gather(*reading)

        assert not set(reader.outcomes) - {"whole", "continued", "error record", "refused 503"}, (
            reader.outcomes
        )
        assert reader.outcomes["continued"] > KILLS / 4, reader.outcomes
        await coordinator.until(coordinator.at_rest)
        for node in nodes:
            await node.seen.wait_for(lambda seen: seen.active == 0 and seen.open == 0)
        recent = [one.request for one in coordinator.parts.observation.journal.recent]
        if len(recent) < 500:  # it remembers no more
            assert sum(one.output_tokens or 0 for one in recent) == reader.tokens
