"""What a model's text means: reasoning, content and tool calls, in each family's own format, read while it arrives.
Start at parser.py.
"""
