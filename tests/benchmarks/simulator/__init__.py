"""The policies compared on a simulated fleet; see `run`."""
