"""The agent's loop: register, report every few seconds, register again when forgotten.

A heartbeat waits for nothing but the coordinator. The watch, the meter and the reach gather what it
carries, each at its own speed; the heartbeat takes what they know at that moment.
"""

import asyncio
import logging
import platform
import uuid
from datetime import datetime

from msgspec import UNSET, Raw, Struct, structs

from ollama_coordinator_common.protocol import Finding, HealthReply, HealthReport, RegisterRequest
from ollama_coordinator_common.settings import AgentConfig
from ollama_coordinator_common.types import AgentId

from . import __version__
from .availability import Availability, signs
from .client import (
    CoordinatorClient,
    CoordinatorError,
    Forgotten,
    Rejected,
)
from .coordinators import Coordinators
from .display import StatusView
from .doctor import OK, REPORTED_OTHERWISE, Surroundings, cards, of_machine
from .link.link import CoordinatorLink, LinkLost
from .metrics import SHOWS_USE, Meter
from .model_server import ModelServer
from .pacing import AgentPace, Backoff, Reminder, forever
from .reach import Offer, Reach, Transport
from .recent import Logs
from .settings import machine_name
from .state import StateFolder
from .suspend import ASK_AGAIN_SECONDS, Gap, is_ending, seconds_asleep, until_announced
from .watch import Watch

log = logging.getLogger(__name__)

LONGEST = 800
"""Characters of a finding's text that are sent; the coordinator takes 1000."""


class AgentParts(Struct, frozen=True, kw_only=True):
    """What a daemon works with; `changed` brings the next heartbeat forward."""

    client: CoordinatorClient
    coordinators: Coordinators
    watch: Watch
    reach: Reach
    transport: Transport
    meter: Meter
    availability: Availability
    state: StateFolder
    logs: Logs
    models: ModelServer
    surroundings: Surroundings
    changed: asyncio.Event


class Daemon:
    """Represents one Ollama to one coordinator."""

    def __init__(self, config: AgentConfig, parts: AgentParts, pace: AgentPace) -> None:
        self.agent_id: AgentId | None = None
        self.trouble: str | None = "not registered yet"
        self.parts = parts
        self._config = config
        parts.models.is_busy = lambda: self._active_requests() > 0
        self._pace = pace
        self._machine_name = machine_name(config)
        self._machine_id = parts.state.machine_id()
        self._instance_id = uuid.uuid4().hex
        self._previous_instance_id = parts.state.last_run.instance_id
        self._backoff = Backoff(pace.retry_first, pace.retry_ceiling)
        self._reminder = Reminder()
        self._sent_findings: list[Finding] | None = None  # what the coordinator knows of them
        self._surroundings = parts.surroundings
        self._is_proven = False  # whether a heartbeat was accepted since the registration
        self._link: CoordinatorLink | None = None
        self._links: set[CoordinatorLink] = set()  # with those that only end what runs over them
        self._ask_reached_at = self._linked_at = 0.0  # by the event loop's clock
        self._paused: str | None = None
        self._decided = asyncio.Event()  # whether this machine serves was found out
        self._awake = asyncio.Event()  # no goodbye was said before sleep
        self._awake.set()
        self._gap = Gap()

    async def run(self) -> None:
        """Report until cancelled; then say goodbye, and only then end Ollama and the relay."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            tasks.create_task(self.parts.watch.run())
            tasks.create_task(self.parts.reach.run())
            tasks.create_task(forever(self._look_for_sleep))
            tasks.create_task(forever(self._wait_for_sleep))
            if self.parts.availability.is_limited:
                tasks.create_task(forever(self._look_at_owner))
            tasks.create_task(self.parts.models.run())
            try:
                await self._take_a_first_look()
                await forever(self._one_registration)
            finally:
                await self._say_goodbye()

    async def _take_a_first_look(self) -> None:
        """Wait a moment for Ollama and the sensors, so that the first report is not empty."""
        try:
            async with asyncio.timeout(self._pace.first_look):
                await self.parts.watch.looked.wait()
                if self.parts.watch.facts.is_running:
                    await self.parts.models.looked.wait()
                if self.parts.availability.is_limited:
                    await self._decided.wait()
        except TimeoutError:
            log.debug("Ollama has not been looked at yet")
        await asyncio.to_thread(self.parts.meter.ready.wait, self._pace.first_look)
        found = await asyncio.to_thread(cards)
        self._surroundings = structs.replace(self._surroundings, cards=found)

    async def _look_at_owner(self) -> float:
        """Find out whether this machine serves now, and report it at once where that changed."""
        cards = [gpu for gpu in self.parts.meter.latest.gpus if not gpu.integrated]
        loads = [one.utilization_percent for one in cards if one.utilization_percent is not None]
        found = await asyncio.to_thread(
            signs, None if self._active_requests() else max(loads, default=None)
        )
        now = asyncio.get_running_loop().time()
        paused = self.parts.availability.reason(datetime.now(), now, found)
        self._decided.set()
        if paused != self._paused:
            self._paused = paused
            self.parts.changed.set()
            log.info(f"takes no new requests: {paused}" if paused else "takes requests again")
        return self._pace.availability

    async def _look_for_sleep(self) -> float:
        """See that the machine has slept: it is remembered, and reported at once."""
        if slept := self._gap.note(seconds_asleep()):
            log.info("this machine slept", extra={"seconds": round(slept)})
            self.parts.state.remember(slept=True)
            self._awake.set()
            self.parts.changed.set()
        return self._pace.look

    async def _wait_for_sleep(self) -> float:
        """Say goodbye before the machine sleeps or is switched off, where that is announced."""
        if not await until_announced(self._go_to_sleep):
            return ASK_AGAIN_SECONDS
        try:
            async with asyncio.timeout(self._pace.falls_asleep):
                await self._awake.wait()
        except TimeoutError:
            log.info("this machine stays awake")
        self._awake.set()
        self.parts.changed.set()
        return 0.0

    async def _go_to_sleep(self) -> None:
        self._awake.clear()
        await self._say_goodbye()

    async def _one_registration(self) -> float:
        """Register, then report until the coordinator forgets us or what was registered changes."""
        await self._awake.wait()
        try:
            await self.parts.coordinators.choose()
            request = self._request(await self.parts.reach.refresh())
            reply = await self.parts.client.register(request)
            if reply.agent_id != self.agent_id:
                log.info(
                    "registered", extra={"agent_id": reply.agent_id, "to": self.parts.client.url}
                )
            self.agent_id, self._sent_findings = reply.agent_id, None
            self.parts.state.remember(agent_id=reply.agent_id, instance_id=self._instance_id)
            self._is_proven = False
            self.parts.reach.note_handshake(reply.handshake)
            self.parts.transport.note(reply.reached, is_running=self._is_running)
            if request.link:
                await self._open_link(reply.agent_id)
            elif self._link is not None:
                self._link.retire()
                self._link = None
            await self._report_while_true(request, reply.agent_id)
        except LinkLost as exc:
            self._note_trouble(exc)
            lived = asyncio.get_running_loop().time() - self._linked_at
            return 0.0 if lived >= self._pace.heartbeat else self._backoff.next()
        except Forgotten:
            self.trouble = "the coordinator forgot this agent"
            log.warning("the coordinator forgot this agent; registering again")
            if not self._is_proven:
                # It forgets as fast as we register: without a delay that would be a storm.
                return self._backoff.next()
            self._backoff.reset()
        except CoordinatorError as exc:
            self._note_trouble(exc)
            return self._delay_after_registration(exc)
        return 0.0

    async def _open_link(self, agent_id: AgentId) -> None:
        """Have a link for this agent; one that still works goes on.

        Raises:
            CoordinatorError: there is none to be had.
        """
        link = self._link
        if link is not None and link.agent_id == agent_id and not link.has_ended:
            return
        if link is not None:
            link.retire()
        parts = self.parts
        link = CoordinatorLink(
            parts.client,
            parts.reach.target,
            parts.watch,
            agent_id,
            parts.changed,
            lambda: parts.models.target,
        )
        await link.open()
        self._link, self._linked_at = link, asyncio.get_running_loop().time()
        self._links.add(link)
        self._tasks.create_task(link.run()).add_done_callback(lambda _: self._links.discard(link))

    async def _report_while_true(self, registered: RegisterRequest, agent_id: AgentId) -> None:
        """Send heartbeats for as long as what was registered is still true, and its link open."""
        loop = asyncio.get_running_loop()
        link = self._link if registered.link else None
        self._ask_reached_at = loop.time()
        while self._request(self.parts.reach.offer) == registered:
            self.parts.changed.clear()
            await self._awake.wait()
            if link is not None and link.has_ended:
                raise LinkLost
            if self.parts.reach.has_moved():
                await self.parts.reach.refresh()
                continue
            next_at = loop.time() + self._pace.heartbeat
            try:
                is_watched = await self._beat(link or self.parts.client, agent_id)
            except CoordinatorError as exc:
                if self._ends_registration(exc):
                    raise
                self._note_trouble(exc)
                next_at = loop.time() + self._delay_after(exc)
            else:
                if is_watched:
                    next_at = min(next_at, loop.time() + self._pace.heartbeat_watched)
                if link is not None:
                    self._ask_reached(link)
            await self._wait_for_news(next_at)
            if link is not None and link.reached is not None:
                self.parts.transport.note(link.reached, is_running=self._is_running)
                link.reached = None

    def _ends_registration(self, exc: CoordinatorError) -> bool:
        """Whether a heartbeat that failed is followed by another registration, maybe elsewhere."""
        if isinstance(exc, Forgotten | LinkLost):
            return True
        return self.parts.coordinators.has_others and not isinstance(exc, Rejected)

    async def _beat(self, channel: CoordinatorClient | CoordinatorLink, agent_id: AgentId) -> bool:
        """Send one heartbeat, and do what its answer asks for; whether an operator looks on."""
        report = self._report(agent_id)
        reply = await channel.report(report)
        if reply.asks_findings is True:
            self._sent_findings = None
        elif report.findings is not UNSET:
            self._sent_findings = report.findings
        if reply.log_after is not UNSET:
            await self._send_log(channel, agent_id, reply.log_after)
        self._note_accepted(reply)
        self.parts.reach.note_handshake(reply.handshake)
        self.parts.transport.note(reply.reached, is_running=self._is_running)
        if reply.restart is not UNSET:
            await self.parts.watch.restart(reply.restart)
        return reply.log_after is not UNSET

    def _ask_reached(self, link: CoordinatorLink) -> None:
        """Ask every now and then whether the link is still needed."""
        now = asyncio.get_running_loop().time()
        if self.parts.transport.is_open and now >= self._ask_reached_at:
            self._ask_reached_at = now + self._pace.ask_reached
            link.ask_reached()

    async def _send_log(
        self, channel: CoordinatorClient | CoordinatorLink, agent_id: AgentId, after: int
    ) -> None:
        """Send the wanted lines of the log; a failure does not disturb the heartbeats."""
        try:
            async with self.parts.logs.news(after) as report:
                await channel.send_log(agent_id, report)
        except (Forgotten, LinkLost):
            raise
        except CoordinatorError as exc:
            log.debug("the log was not sent", extra={"reason": str(exc)})

    async def _wait_for_news(self, until: float) -> None:
        try:
            async with asyncio.timeout_at(until):
                await self.parts.changed.wait()
        except TimeoutError:
            return

    async def _say_goodbye(self) -> None:
        """Report to the coordinator, if it is there, that this agent leaves."""
        if self.agent_id is None:
            return
        try:
            async with asyncio.timeout(self._pace.goodbye):
                asleep = not self._awake.is_set() or await asyncio.to_thread(is_ending)
                link = self._link
                channel = self.parts.client if link is None or link.has_ended else link
                await channel.report(self._report(self.agent_id, leaving=True, asleep=asleep))
        except (CoordinatorError, TimeoutError) as exc:
            log.warning("left without a goodbye", extra={"reason": str(exc) or "timed out"})
        else:
            log.info("said goodbye to the coordinator")

    def _note_trouble(self, exc: CoordinatorError) -> None:
        """Note why the coordinator did not accept what was sent."""
        self.trouble = str(exc)
        self._reminder.warn(f"{self.trouble} (it is tried again)")

    def _note_accepted(self, reply: HealthReply) -> None:
        """A report was accepted; a problem that the reply names is a trouble all the same."""
        self._is_proven = True
        self._backoff.reset()
        self.trouble = None if reply.problem is UNSET else f"connected, but {reply.problem}"
        if self.trouble is not None:
            self._reminder.warn(self.trouble)
        elif self._reminder.over():
            log.info("all is well with the coordinator again", extra={"url": self.parts.client.url})

    def _delay_after(self, exc: CoordinatorError) -> float:
        """The seconds until the next try; after a refusal only an operator can change anything."""
        return self._pace.rejected if isinstance(exc, Rejected) else self._backoff.next()

    def _delay_after_registration(self, exc: CoordinatorError) -> float:
        """The same for one that failed; without a delay if there is another coordinator to try."""
        if not isinstance(exc, Rejected):
            return 0.0 if self.parts.coordinators.failed() else self._backoff.next()
        if self.parts.transport.is_link:
            self.parts.transport.give_up(asyncio.get_running_loop().time())
        return self._delay_after(exc)

    def view(self) -> StatusView:
        """What the terminal shows."""
        offer, readings = self.parts.reach.offer, self.parts.meter.latest
        return StatusView(
            machine_name=self._machine_name,
            coordinator_url=self.parts.client.url,
            ollama_url=self.parts.watch.url,
            facts=self.parts.watch.facts,
            readings=readings,
            agent_id=self.agent_id,
            machine_id=self._machine_id,
            ip_address=offer.ip_address if offer else None,
            relay_port=offer.relay_port if offer else None,
            is_linked=self.parts.transport.is_link,
            active_requests=self._active_requests(),
            paused=self._paused,
            coordinator_trouble=self.trouble,
        )

    def _active_requests(self) -> int:
        linked = sum(link.active_requests for link in self._links)
        return (self.parts.meter.latest.requests or 0) + self.parts.reach.relayed_requests + linked

    def _other_requests(self) -> int | None:
        """Those of them that are not the coordinator's; `None` where that cannot be told."""
        offer = self.parts.reach.offer
        is_told_apart = self.parts.transport.is_link or (offer is not None and offer.relay_port)
        return self.parts.meter.latest.requests if is_told_apart and SHOWS_USE else None

    def _findings(self) -> list[Finding]:
        """What an operator should know of this machine and no other field of a report says."""
        skew = self.parts.client.skew_seconds
        around = structs.replace(self._surroundings, skew_seconds=skew)
        found = of_machine(self.parts.watch.facts, self.parts.meter.latest, around)
        wanted = [one for one in found if one.level != OK and one.check not in REPORTED_OTHERWISE]
        return [structs.replace(one, text=one.text[:LONGEST]) for one in wanted]

    @property
    def _is_running(self) -> bool:
        return self.parts.watch.facts.is_running

    def _request(self, offer: Offer | None) -> RegisterRequest:
        if offer is None:
            raise CoordinatorError(
                f"no way to {self.parts.client.url}: its host name does not resolve, or there is no"
                " network; check COORDINATOR_URL, or set AGENT_IP_ADDRESS"
            )
        return RegisterRequest(
            machine_name=self._machine_name,
            ip_address=offer.ip_address,
            ollama_version=self.parts.watch.facts.version or "",
            ollama_port=self._config.ollama_port,
            machine_id=self._machine_id,
            relay_port=offer.relay_port,
            agent_version=__version__,
            instance_id=self._instance_id,
            previous_instance_id=self._previous_instance_id,
            platform=f"{platform.system()} {platform.release()} {platform.machine()}",
            link=self.parts.transport.is_link,
            sleeps=self.parts.state.last_run.slept,
            mac=offer.wake.mac,
            broadcast=offer.wake.broadcast,
            handshake=self.parts.reach.can_handshake,
        )

    def _report(
        self, agent_id: AgentId, *, leaving: bool = False, asleep: bool = False
    ) -> HealthReport:
        facts, readings = self.parts.watch.facts, self.parts.meter.latest
        lists, findings = {"tags": facts.tags, "ps": facts.ps}, self._findings()
        self.parts.meter.gpus.model_bytes = facts.ps.gpu_bytes if facts.ps else 0
        return HealthReport(
            agent_id=agent_id,
            cpu_usage=readings.cpu_percent,
            memory_usage=readings.memory_percent,
            active_requests=self._active_requests(),
            other_requests=self._other_requests(),
            ollama_running=facts.is_running,
            ollama_version=facts.version,
            memory_total_bytes=readings.memory_total_bytes,
            disk_free_bytes=readings.disk_free_bytes,
            gpus=readings.gpus,
            runner=facts.runner,
            model_blobs=facts.disk.blobs,
            model_contents=facts.disk.contents,
            broken_models=facts.disk.broken,
            left_behind=facts.left_behind,
            leaving=leaving,
            asleep=asleep,
            paused=self._paused,
            instance_id=self._instance_id,
            store=self.parts.models.store(linked=self.parts.transport.is_link),
            findings=UNSET if findings == self._sent_findings else findings,
            owned=self.parts.watch.owns_server,
            **{name: Raw(known.body) for name, known in lists.items() if known},
        )
