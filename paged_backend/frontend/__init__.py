"""A model instance inside Triton Server: reads tensors, tokenises, asks the engine, detokenises and sends.

Start with front_end.py, then answer.py (one request on its way); triton_io.py is the only file that speaks to the
server.
"""
