"""The engine on llama.cpp."""
