"""Tensor parallelism's processes: rank 0 is the engine, its children are the other ranks, and all run the same steps on
their parts of the model.

Start with rank_processes.py (rank 0's side), then rank_process.py (a child's).
"""
