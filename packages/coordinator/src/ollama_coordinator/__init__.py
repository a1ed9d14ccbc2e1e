"""One endpoint for many Ollama machines: the coordinator."""
