"""Decides what each step computes. Touches no tensor.

Start with scheduler.py: a step in one function. lifecycle.py moves sequences from waiting to running to over,
page_pool.py knows who holds which page.
"""
