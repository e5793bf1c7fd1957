"""A front end's side of the engine: which engine process it speaks to, what it has asked, and how it goes on when that
process dies.

Start with client.py; supervisor.py decides who owns the engine, live_requests.py keeps what another engine must know.
"""
