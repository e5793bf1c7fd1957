"""Structured output: from the form a caller asks for to the tokens that may come next.

Start with options.py (what may be asked), then grammars.py (compiled grammars and the guide of each sequence); compiler.py and compiler_process.py
keep compilation away from the engine.
"""
