"""The engine process: a scheduler, a runner, and a loop that never lets one wait for the other.

Start with engine.py (the loop), then process.py (its sockets) and loading.py (from options to an engine).
"""
