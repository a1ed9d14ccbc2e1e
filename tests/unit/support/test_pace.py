"""How a node with a speed reads and writes: in batches, in lines, beside others."""

from __future__ import annotations

import json

import aiohttp

from support.ollama import Hardware, Model, StandIn
from support.ollama.gojson import Fields
from support.ollama.routes.options import flatten

GB = 1_000_000_000


async def test_tokens_of_a_while_go_out_in_one_line(http: aiohttp.ClientSession) -> None:
    """The first by itself, so that the time to it stays what it was; all of them are counted."""
    hardware = Hardware(decode_tokens_per_second=1_000, line_seconds=0.01, reference_bytes=2 * GB)
    async with StandIn(hardware=hardware) as node:
        sent = {"model": "llama3.2", "prompt": "hi", "options": {"num_predict": 21}}
        async with http.post(node.url + "/api/generate", json=sent) as answer:
            lines = [json.loads(line) async for line in answer.content]
    words = [len(line["response"].split()) for line in lines]
    assert words == [1, 10, 10, 0]
    assert lines[-1]["eval_count"] == 21


async def test_who_joins_changes_the_pace_of_a_prompt_that_is_being_read(
    http: aiohttp.ClientSession,
) -> None:
    asked: list[int] = []

    def slowdown(in_runner: int, busy: int) -> float:
        asked.append(in_runner)
        return 1.0

    hardware = Hardware(prefill_tokens_per_second=1e6, slowdown=slowdown)
    async with StandIn(hardware=hardware) as node:
        sent = {"model": "llama3.2", "prompt": "word" * 2_000, "stream": False}
        async with http.post(node.url + "/api/generate", json=sent) as answer:
            assert (await answer.json())["prompt_eval_count"] == 2_000
    assert len(asked) == 4


async def test_a_careful_node_leaves_room_beside_what_is_in_memory() -> None:
    models = [Model(name, size_bytes=3 * GB) for name in ("a", "b")]
    for share, loaded in ((1.0, {"a:latest", "b:latest"}), (0.8, {"b:latest"})):
        hardware = Hardware(vram_bytes=6 * GB, fit_share=share)
        async with StandIn(models, hardware=hardware) as node:
            for name in ("a", "b"):
                await node.load(name)
            assert set(node.loaded) == loaded


def test_a_prompt_and_its_answer_are_how_the_next_turn_begins() -> None:
    question = {"role": "user", "content": "why?"}
    turns = [question, {"role": "assistant", "content": "so!"}, question]
    first, second = (
        flatten([Fields("Message", one) for one in said]) for said in (turns[:1], turns)
    )
    assert second.startswith(first + "so!")
