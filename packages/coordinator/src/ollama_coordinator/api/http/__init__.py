"""The edge between HTTP and everything else: requests read, replies, errors and streams written."""
