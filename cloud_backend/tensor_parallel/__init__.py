"""One model over several processes, split by transformers' own plan."""
