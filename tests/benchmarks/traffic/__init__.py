"""A drawn load against stand-ins of Ollama as real HTTP servers, and what its clients see."""
