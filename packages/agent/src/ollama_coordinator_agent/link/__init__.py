"""The link: connections that this machine opens, and over which the coordinator reaches it."""
