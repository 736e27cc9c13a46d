# A machine with systemd, nginx and BCC. test_systemd.py installs the program's Debian package on it.
FROM localhost/debian
RUN apt-get update && apt-get install -y --no-install-recommends nginx systemd && rm -rf /var/lib/apt/lists/*
CMD ["/lib/systemd/systemd"]
