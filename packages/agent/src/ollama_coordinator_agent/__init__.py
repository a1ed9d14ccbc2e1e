"""The agent: it stands beside one Ollama, looks after it, and reports it to the coordinator."""

from importlib.metadata import version

__version__ = version("ollama-coordinator-agent")
