"""`python -m export` is `stip-export`."""

from export.cli import main

main()
