"""Commands that ask a running coordinator, beside `serve`."""
