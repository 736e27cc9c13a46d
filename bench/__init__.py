"""Measures what tracing costs in nginx, on the machine and in the program; docs/overhead.md has the methods."""
