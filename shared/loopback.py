"""Addresses, and which of them are this machine."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address, no port) can only be this machine (RFC 5735, RFC 6761 §6.3)."""
    if host == "localhost":
        return True
    try:
        return address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address. One of IPv4 inside IPv6, as a socket for both gives it (RFC 4291 §2.5.5.2), is the one of IPv4.

    Raises ValueError.
    """
    found = ipaddress.ip_address(text)
    return (found.ipv4_mapped if found.version == 6 else None) or found
