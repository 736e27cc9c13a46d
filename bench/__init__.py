"""What tracing costs: in nginx, on the machine, in the program. `make bench`; the methods are in docs/overhead.md."""
