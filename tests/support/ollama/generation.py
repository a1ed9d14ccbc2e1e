"""One generation: load, slot, prompt evaluation, then a token at a time, all of it timed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .engine import Engine
from .models import Model
from .runner import Runner, Settings, Slot
from .script import TOKEN_CHARACTERS, Script, count_tokens
from .wire import StreamError

Kind = Literal["content", "thinking"]
Emit = Callable[[Kind, str], Awaitable[None]]

# A stream further behind than this (it was held, or its client read slowly) does not catch up.
CATCH_UP_SECONDS = 1.0


@dataclass(frozen=True)
class Turn:
    """What a route asks the engine for."""

    model: Model
    prompt: str
    script: Script
    settings: Settings
    keep_alive: float | None = None
    extra_tokens: int = 0  # images
    refusal: tuple[int, str] | None = None  # what the loaded runner says in place of an answer


@dataclass
class Timings:
    """Nanoseconds of wall time, as the final line reports them."""

    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0

    def fields(self) -> dict[str, int]:
        """Zero values are left out, as Go's `omitempty` does."""
        return {name: value for name, value in vars(self).items() if value}


@dataclass
class Generation:
    """A running answer: `run` it, then read what it took."""

    engine: Engine
    turn: Turn
    runner: Runner
    started: float
    loaded_at: float
    timings: Timings = field(default_factory=Timings)

    async def run(self, emit: Emit) -> None:
        """Waits for a slot, evaluates the prompt, hands on the tokens at the node's pace."""
        prompt = self.turn.prompt
        if self.turn.refusal is not None:
            status, text = self.turn.refusal
            raise StreamError(text, status)
        self.timings.load_duration = _nanoseconds(self.loaded_at - self.started)
        async with self.runner.slot(prompt) as slot:
            await self._evaluate(slot)
            slot.cached = prompt
            await self._decode(emit)
            slot.cached = prompt + "".join(self.turn.script.content)
        self.timings.total_duration = _nanoseconds(_now() - self.started)

    async def _evaluate(self, slot: Slot) -> None:
        """Reads the prompt; if its client leaves meanwhile, the slot is busy until it is read."""
        turn, began = self.turn, _now()
        total = count_tokens(turn.prompt) + turn.extra_tokens
        self.timings.prompt_eval_count = min(total, turn.settings.num_ctx)
        seconds_a_token = self.engine.hardware.prefill_seconds(turn.model, 1)
        if seconds_a_token or self.engine.gate.holds_prompts:
            reading = self._read(slot, total)
            if self.engine.evaluates_on:
                slot.evaluation = asyncio.create_task(reading)
                await asyncio.shield(slot.evaluation)
            else:
                await reading
        self.timings.prompt_eval_duration = _nanoseconds(_now() - began)

    async def _read(self, slot: Slot, total: int) -> None:
        """Only what the slot does not remember costs time; the count reports the whole prompt."""
        turn, due = self.turn, _now()
        fresh = max(total - slot.overlap(turn.prompt) // TOKEN_CHARACTERS, 1)
        for batch in _batches(fresh, turn.settings.num_batch):
            seconds = self.engine.hardware.prefill_seconds(turn.model, batch)
            if seconds:
                due = await _pause(due + seconds * self._factor())
        await self.engine.gate.before_prompt_ends()

    async def _decode(self, emit: Emit) -> None:
        script, gate, seen = self.turn.script, self.engine.gate, self.engine.seen
        interval = self.engine.hardware.decode_seconds(self.turn.model)
        per_line = self.engine.hardware.tokens_per_line(self.turn.model)
        began = due = _now()
        produced = 0
        if not (script.thinking or script.content) and gate.stops(0):
            await gate.before_token()
        kind: Kind
        for kind, texts in (("thinking", script.thinking), ("content", script.content)):
            for text, tokens in _lines(texts, per_line):
                if gate.stops(produced):
                    await gate.before_token()
                if interval:
                    due = await _pause(due + interval * tokens * self._factor())
                else:
                    await asyncio.sleep(0)
                produced += tokens
                seen.tokens += tokens
                await emit(kind, text)
        self.timings.eval_count = produced or len(script.tool_calls)
        self.timings.eval_duration = _nanoseconds(_now() - began)

    def _factor(self) -> float:
        return self.engine.hardware.factor(self.runner.busy, self.engine.busy_runners)


@contextlib.asynccontextmanager
async def generation(engine: Engine, turn: Turn) -> AsyncIterator[Generation]:
    """Brings the model in (this is where a status can still be an error), then hands over."""
    started = _now()
    async with engine.runner(turn.model, turn.settings, turn.keep_alive) as runner:
        yield Generation(engine, turn, runner, started, _now())


def _batches(tokens: int, most: int) -> Iterator[int]:
    """A prompt is read in batches: who joins or leaves meanwhile changes the pace of the rest."""
    for read in range(0, tokens, most):
        yield min(most, tokens - read)


def _lines(tokens: Sequence[str], most: int) -> Iterator[tuple[str, int]]:
    """What is written at once, and how many tokens that is; the first token goes by itself."""
    yield from ((token, 1) for token in tokens[:1])
    for start in range(1, len(tokens), most):
        line = tokens[start : start + most]
        yield "".join(line), len(line)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


async def _pause(due: float) -> float:
    """Sleeps until then and says when the next interval starts."""
    now = _now()
    if due > now:
        await asyncio.sleep(due - now)
    elif now - due > CATCH_UP_SECONDS:
        return now
    else:
        await asyncio.sleep(0)
    return due
