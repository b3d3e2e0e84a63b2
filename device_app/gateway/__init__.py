"""The gateway: an OpenAI-compatible API and a web page on this machine, in front of a private model."""
