"""Our own routes: agents, operations, what was and is, and the dashboard."""
