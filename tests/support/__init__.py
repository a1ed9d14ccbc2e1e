"""What the tests stand on: stand-ins, servers and clocks; nothing here is shipped."""
