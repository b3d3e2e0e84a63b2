"""What leaks, measured: attacks on an export as the cloud would run them, each beside a control that must succeed."""
