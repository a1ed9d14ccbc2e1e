"""Ollama's surface around models: lists, details, files, transfers, and what is ollama.com's."""
