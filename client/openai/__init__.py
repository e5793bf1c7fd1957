"""`paged openai`: OpenAI's API in front of a running server."""
