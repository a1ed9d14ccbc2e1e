"""The HTTP surface: Ollama's routes as the fleet answers them, and our own."""
