"""`python -m cloud_backend` is `stip-cloud`."""

from cloud_backend.cli import main

main()
