"""What the three parties have in common: the wire, the user key, the bundle manifests, the errors."""
