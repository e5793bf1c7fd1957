"""Runs steps on the device: one copy there, forward pass, sampling, one copy back.

Start with model_runner.py, then step_plan.py (where everything of a step lies) and step_tensors.py (the rows that live
on the device).
"""
