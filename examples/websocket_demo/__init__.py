"""The raw protocol, for people who build their own client."""
