"""Programs that show the three parties at work."""
