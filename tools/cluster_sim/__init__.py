"""Many servers in one process, and no model: what does routing do for a trace of requests? Start with __main__.py;
simulation.py is the loop.
"""
