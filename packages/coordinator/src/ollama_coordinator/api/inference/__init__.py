"""The request path: from a client to an agent, and the answer back."""
