"""In the vehicle: frames of a folder to one-line descriptions, as JSON lines. `python -m examples.cabin --help`."""
