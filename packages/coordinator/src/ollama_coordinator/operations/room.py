"""How large a model is, and which machines have room for it: known before a byte moves.

The size is what the manifest says, which the coordinator reads at the model registry; where it
cannot, that of the copies in the fleet; where there is none, nothing is said.
"""

import logging
from collections.abc import Iterable

import msgspec

from ollama_coordinator.clock import Clock
from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler import main_memory_of, predicted_bytes
from ollama_coordinator.upstream import Unreachable, Upstreams
from ollama_coordinator_common.names import ModelName
from ollama_coordinator_common.network import is_no_machine, parse_address

from .transfers import MANIFEST_BYTES, files_of

log = logging.getLogger(__name__)

DISK_RESERVE_BYTES = 1_000_000_000
"""Free disk that a model leaves: a full disk stops more than Ollama."""

ASK_SECONDS = 3.0
"""How long the model registry may take; the pull begins without it then."""

ASK_AGAIN_SECONDS = 300.0
"""How long a model registry is not asked that did not answer: a fleet without internet has none."""

ACCEPT = ("Accept", "application/vnd.docker.distribution.manifest.v2+json")


class ModelSizes:
    """Asks model registries how large models are."""

    def __init__(self, upstreams: Upstreams, clock: Clock) -> None:
        self._upstreams = upstreams
        self._clock = clock
        self._silent_until: dict[str, float] = {}

    async def size(
        self, name: ModelName, copies: Iterable[AgentState], *, insecure: bool
    ) -> int | None:
        """The bytes of all files of a model; `None`: nobody knows."""
        asked = await self._ask(name, insecure=insecure)
        held = [agent.inventory.available.get(name.key) for agent in copies]
        known = max((row.model.size for row in held if row is not None), default=0)
        return asked or known or None

    async def _ask(self, name: ModelName, *, insecure: bool) -> int | None:
        now, host = self._clock.now(), name.host
        address = parse_address(host.rpartition(":")[0] or host)
        if now < self._silent_until.get(host, 0.0) or (address and is_no_machine(address)):
            return None
        path = f"/v2/{name.namespace}/{name.model}/manifests/{name.tag}"
        url = f"{'http' if insecure else 'https'}://{host}{path}"
        try:
            status, body = await self._upstreams.fetch(
                "GET", url, seconds=ASK_SECONDS, headers=[ACCEPT], tries=0, limit=MANIFEST_BYTES
            )
        except Unreachable as exc:
            log.info("no size from a model registry", extra={"host": host, "reason": str(exc)})
            kept = {one: until for one, until in self._silent_until.items() if until > now}
            self._silent_until = {**kept, host: now + ASK_AGAIN_SECONDS}
            return None
        try:
            return sum(files_of(body).values()) if status == 200 else None
        except msgspec.DecodeError:
            return None


def lacks_disk(agent: AgentState, key: str, size: int | None) -> str:
    """Why a model has no room on an agent's disk; empty: it has, as far as is known.

    What the agent has of the model already counts as room.
    """
    free = agent.report.disk_free_bytes if agent.report is not None else None
    if size is None or free is None:
        return ""
    row = agent.inventory.available.get(key)
    needed = max(0, size - (row.model.size if row is not None else 0))
    if needed == 0 or free >= needed + DISK_RESERVE_BYTES:
        return ""
    return f"no room on its disk: {_gigabytes(needed)} are needed, {_gigabytes(free)} are free"


def lacks_memory(agent: AgentState, size: int | None) -> str:
    """Why an agent could not run a model with all its memory; empty: it could, as far as known."""
    total = main_memory_of(agent)
    if size is None or total is None or predicted_bytes(size) <= total:
        return ""
    return f"too little memory: {_gigabytes(predicted_bytes(size))} of {_gigabytes(total)}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
