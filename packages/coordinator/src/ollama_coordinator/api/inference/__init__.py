"""The request path: from what a client sent to an agent, and the answer back."""
