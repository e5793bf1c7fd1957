"""Starts a tritonserver with the paged model and stops it again: `paged serve`.

Start with launch.py.
"""
