"""Codec of lease keys and values: the store's text to the model and back.

key    A.B.C.D-LEN  or  A.B.C.D-LEN&V6-LEN6
value  {"PublicIP":"192.0.2.7","PublicIPv6":null}   the form flannel writes since v0.15
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from typing import Any, Final

from tundp.errors import LeaseFormatError
from tundp.lease import gojson
from tundp.lease.model import UNSPECIFIED, LeaseAttributes, LeaseKey
from tundp.printable import quoted

_KEY: Final = re.compile(
    r"(\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3})-(\d{1,3})(?:&([a-f0-9:]+)-(\d{1,3}))?", re.ASCII
)
_PLAIN_KEY: Final = re.compile(
    r"(0|[1-9]\d{0,2})\.(0|[1-9]\d{0,2})\.(0|[1-9]\d{0,2})\.(0|[1-9]\d{0,2})-(\d|[12]\d|3[01])",
    re.ASCII,
)
"""Fast path: a key without IPv6 part, spelled as flannel spells it, as nearly all keys are."""
_V4_LEN_MAX: Final = 31
_V6_LEN_MAX: Final = 127
_KNOWN: Final = frozenset({"publicip", "publicipv6", "backendtype", "backenddata", "backendv6data"})


def parse_key(name: str) -> LeaseKey:
    """The last element of a lease's path, or LeaseFormatError.

    Lengths must fit flannel's fields (5 bits for IPv4, 7 for IPv6). The address need not be
    aligned to its length, as in flannel. The spelling must be the one flannel writes: an alias
    such as 10.5.1.0-024 would replace the lease it resembles, and delete it when deleted.
    """
    match = _PLAIN_KEY.fullmatch(name)
    if match is not None:
        a, b, c, d, length = map(int, match.groups())
        if max(a, b, c, d) <= 255:
            return LeaseKey(IPv4Interface((a << 24 | b << 16 | c << 8 | d, length)))
    match = _KEY.fullmatch(name)
    if match is None:
        raise LeaseFormatError(f"{quoted(name)} is not a subnet key such as 10.5.52.0-24")
    v4_text, v4_len, v6_text, v6_len = match.groups()
    try:
        if int(v4_len) > _V4_LEN_MAX:
            raise ValueError(f"prefix length {v4_len} is over {_V4_LEN_MAX}")
        v4 = IPv4Interface(f"{IPv4Address(v4_text)}/{int(v4_len)}")
        v6 = None
        if v6_text is not None:
            if int(v6_len) > _V6_LEN_MAX:
                raise ValueError(f"IPv6 prefix length {v6_len} is over {_V6_LEN_MAX}")
            v6 = IPv6Interface(f"{IPv6Address(v6_text)}/{int(v6_len)}")
    except ValueError as error:
        raise LeaseFormatError(f"{quoted(name)} is not a subnet key: {error}") from None
    key = LeaseKey(v4, v6)
    if str(key) != name:
        raise LeaseFormatError(f"{quoted(name)} is not how flannel spells the subnet key {key}")
    return key


def parse_value(text: str) -> LeaseAttributes:
    """A lease value, or LeaseFormatError. A missing PublicIP reads as 0.0.0.0, as in flannel."""
    fields = gojson.parse_object(text, "lease value")
    public_ip = fields.get("PublicIP")
    public_ipv6 = fields.get("PublicIPv6")
    backend_type = fields.get("BackendType")
    return LeaseAttributes(
        public_ip=(
            UNSPECIFIED
            if public_ip is gojson.MISSING
            else gojson.expect_ipv4(public_ip, "PublicIP")
        ),
        public_ipv6=_parse_ipv6(public_ipv6),
        backend_type=(
            ""
            if backend_type is gojson.MISSING or backend_type is None
            else gojson.expect_string(backend_type, "BackendType")
        ),
        backend_data=_raw(fields.get("BackendData")),
        backend_v6_data=_raw(fields.get("BackendV6Data")),
        extra=fields.unknown(_KNOWN),
    )


def encode_value(attributes: LeaseAttributes) -> str:
    """A lease value as flannel writes it: fixed order, no spaces, empty fields left out."""
    value: dict[str, Any] = {
        "PublicIP": str(attributes.public_ip),
        "PublicIPv6": None if attributes.public_ipv6 is None else str(attributes.public_ipv6),
    }
    if attributes.backend_type:
        value["BackendType"] = attributes.backend_type
    if attributes.backend_data is not None:
        value["BackendData"] = attributes.backend_data
    if attributes.backend_v6_data is not None:
        value["BackendV6Data"] = attributes.backend_v6_data
    return gojson.dumps(value | dict(attributes.extra))


def _parse_ipv6(value: Any) -> IPv6Address | None:
    if value is gojson.MISSING or value is None:
        return None
    text = gojson.expect_string(value, "PublicIPv6")
    try:
        # Python accepts a zone (fe80::1%eth0); Go, and so flannel, does not.
        return IPv6Address(text.replace("%", "/"))
    except ValueError:
        raise LeaseFormatError(f"PublicIPv6 is {quoted(text)}, not an IPv6 address") from None


def _raw(value: Any) -> Any:
    return None if value is gojson.MISSING else gojson.plain(value)
