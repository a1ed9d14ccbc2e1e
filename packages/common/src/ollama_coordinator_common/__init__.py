"""What the coordinator and its agents must agree on; depends on msgspec alone."""
