"""Addresses of workers, as "host:port"."""

import re
from typing import Any

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):([0-9]{1,5})")


def is_address(value: Any) -> bool:
    """Whether it is "host:port", with a port of 1 to 65535."""
    match = isinstance(value, str) and _ADDRESS.fullmatch(value)
    return bool(match and 1 <= int(match[2]) <= 65535)


def address_of(host: str, port: int) -> str:
    """ "host:port", with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_of(address: str) -> str:
    """The host of "host:port", without the brackets of IPv6."""
    return address.rpartition(":")[0].strip("[]")


def port_of(address: str) -> int:
    """The port of "host:port"."""
    return int(address.rpartition(":")[2])
