"""The device on an emulated arm64: `python -m tests.arm64`."""
