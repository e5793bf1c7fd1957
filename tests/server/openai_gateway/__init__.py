"""`paged openai` as typed, before a real tritonserver, asked by OpenAI's own client library."""
