"""How long a test waits for a process or a state before it gives up.

It is a guard against tests that hang and no claim about speed: a busy machine may be many times slower than an idle one.
"""

PATIENCE = 900.0
"""Seconds."""
