"""What talks to a running server, and the `paged` command."""
