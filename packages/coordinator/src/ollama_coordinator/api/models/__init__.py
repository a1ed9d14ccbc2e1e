"""Ollama's routes around models: lists, details, transfers and files, and ollama.com."""
