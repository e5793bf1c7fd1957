"""`paged top`: a running engine, live, in the terminal or in a browser."""
