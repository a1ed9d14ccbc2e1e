"""Interrupts of another task's block, and the choice of an event loop."""

import asyncio
import sys

import pytest

from ollama_coordinator.aio import Interrupt, loop_of
from ollama_coordinator_common.error import ConfigError


class Lost(Exception):
    """What the tests fire."""


async def forever() -> None:
    await asyncio.Event().wait()


def leftover() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def settled() -> None:
    """Let every other task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_block_that_waits_ends_with_the_exception() -> None:
    interrupt = Interrupt()
    asyncio.get_running_loop().call_soon(interrupt.fire, Lost("gone"))
    with pytest.raises(Lost, match="gone"):
        async with interrupt:
            await forever()
    assert leftover() == 0
    await asyncio.sleep(0)


async def test_a_block_can_end_itself() -> None:
    interrupt = Interrupt()
    with pytest.raises(Lost):
        async with interrupt:
            interrupt.fire(Lost())
            await forever()
    assert leftover() == 0


async def test_a_block_that_is_already_lost_does_not_begin() -> None:
    interrupt = Interrupt()
    interrupt.fire(Lost())
    begun = False
    with pytest.raises(Lost):
        async with interrupt:
            begun = True
    assert not begun
    assert leftover() == 0


async def test_firing_after_the_end_does_nothing() -> None:
    interrupt = Interrupt()
    async with interrupt:
        pass
    interrupt.fire(Lost())
    await asyncio.sleep(0)
    assert leftover() == 0


async def test_a_block_that_is_left_alone_keeps_its_own_exception() -> None:
    with pytest.raises(KeyError):
        async with Interrupt():
            raise KeyError
    assert leftover() == 0


async def test_only_the_first_exception_counts() -> None:
    interrupt = Interrupt()
    with pytest.raises(Lost, match="first"):
        async with interrupt:
            interrupt.fire(Lost("first"))
            interrupt.fire(Lost("second"))
            await forever()
    assert leftover() == 0


async def test_what_the_block_raises_on_its_way_out_wins() -> None:
    interrupt = Interrupt()
    with pytest.raises(KeyError):
        async with interrupt:
            interrupt.fire(Lost())
            try:
                await forever()
            finally:
                raise KeyError
    assert leftover() == 0


async def test_the_block_cleans_up_before_the_exception_leaves_it() -> None:
    interrupt = Interrupt()
    cleaned = False
    with pytest.raises(Lost):
        async with interrupt:
            interrupt.fire(Lost())
            try:
                await forever()
            finally:
                await asyncio.sleep(0)
                cleaned = True
    assert cleaned


@pytest.mark.parametrize("fired_first", [True, False])
async def test_a_cancellation_from_elsewhere_stays_one(fired_first: bool) -> None:
    interrupt = Interrupt()

    async def work() -> None:
        async with interrupt:
            await forever()

    task = asyncio.create_task(work())
    await settled()
    if fired_first:
        interrupt.fire(Lost())
        task.cancel()
    else:
        task.cancel()
        interrupt.fire(Lost())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_a_cancellation_alone_passes_through() -> None:
    async def work() -> None:
        async with Interrupt():
            await forever()

    task = asyncio.create_task(work())
    await settled()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_inner_of_two_blocks_ends_alone() -> None:
    outer, inner = Interrupt(), Interrupt()
    async with outer:
        with pytest.raises(Lost, match="inner"):
            async with inner:
                inner.fire(Lost("inner"))
                await forever()
        assert leftover() == 0
        await asyncio.sleep(0)


async def test_the_outer_of_two_blocks_ends_both() -> None:
    outer, inner = Interrupt(), Interrupt()
    with pytest.raises(Lost, match="outer"):
        async with outer, inner:
            outer.fire(Lost("outer"))
            await forever()
    assert leftover() == 0


@pytest.mark.parametrize("outer_first", [True, False])
async def test_the_outer_wins_where_both_are_fired(outer_first: bool) -> None:
    outer, inner = Interrupt(), Interrupt()
    order = [outer, inner] if outer_first else [inner, outer]
    with pytest.raises(Lost, match="outer"):
        async with outer, inner:
            for interrupt in order:
                interrupt.fire(Lost("outer" if interrupt is outer else "inner"))
            await forever()
    assert leftover() == 0


async def test_a_time_limit_around_a_block_is_still_one() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0), Interrupt():
            await forever()
    assert leftover() == 0


async def test_a_block_in_a_task_that_was_cancelled_before_can_be_interrupted() -> None:
    interrupt = Interrupt()

    async def work() -> int:
        try:
            await forever()
        except asyncio.CancelledError:
            with pytest.raises(Lost):
                async with interrupt:
                    interrupt.fire(Lost())
                    await forever()
        return leftover()

    task = asyncio.create_task(work())
    await settled()
    task.cancel()
    assert await task == 1


@pytest.mark.spec("OPERATION-16")
def test_without_uvloop_asyncio_runs_it_unless_uvloop_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert loop_of("auto") is None
    with pytest.raises(ConfigError, match="COORDINATOR_LOOP=uvloop does not work") as caught:
        loop_of("uvloop")
    assert "uv tool install './packages/coordinator[fast]'" in str(caught.value)


@pytest.mark.spec("OPERATION-16")
def test_uvloop_runs_it_where_it_is_installed() -> None:
    uvloop = pytest.importorskip("uvloop")
    assert loop_of("auto") is uvloop.new_event_loop
    assert loop_of("asyncio") is None
    assert loop_of("auto", "self") is None
    with pytest.raises(ConfigError, match="uvloop cannot serve COORDINATOR_TLS"):
        loop_of("uvloop", "cert.pem,key.pem")
