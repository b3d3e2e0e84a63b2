"""`python -m device_app` is `stip-device`."""

from device_app.cli import main

main()
