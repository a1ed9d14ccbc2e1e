"""Our own routes: agents, operations, requests, history, settings, and the dashboard."""
