"""A fleet in simulated time: recorded or made-up traces played through any policy."""

from .machine import Fleet, MachineSpec, ModelSpec, Outage
from .replay import Simulation
from .summary import Record, Replay, Summary, summarise
from .trace import TraceRequest, read_trace, write_trace

__all__ = [
    "Fleet",
    "MachineSpec",
    "ModelSpec",
    "Outage",
    "Record",
    "Replay",
    "Simulation",
    "Summary",
    "TraceRequest",
    "read_trace",
    "summarise",
    "write_trace",
]
