"""Other systems before the same machines: one module each, found on the search path or left out.

None of them is a dependency, and no test needs them. Each offers `PEER`: its name,
the program to look for, and `serving`, which runs it for a block.
"""
