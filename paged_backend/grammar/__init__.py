"""Structured output: from the form a caller asks for to the tokens that may come next.

Start with options.py (what may be asked), then grammars.py (compiled grammars and the guide of each sequence). No
grammar is worked on in the engine's
process: workers.py starts nursery.py, whose children compile (lanes.py, compiler_process.py) and follow (follower.py,
    follower_process.py).
"""
