"""Other systems before the same machines: one module each, found on the search path or left out.

None of them is a dependency, and no test needs them. Each offers `NAME`, `find`, which tells what
to start, and `serving`, which runs it for a block.
"""
