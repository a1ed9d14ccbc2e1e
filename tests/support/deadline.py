"""How long a test waits for an event before it fails."""

DEADLINE_SECONDS = 60.0
"""Only a fault may exceed it, never a busy machine: the suite passes beside another build.

It is shorter than pytest's own timeout, so that the failure names the wait, and shorter than the
coordinator's keep-alive of 180 s, so that a connection which should close is not closed by that.
"""
