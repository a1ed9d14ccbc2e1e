"""The routes: Ollama's as the fleet answers them, and our own."""
