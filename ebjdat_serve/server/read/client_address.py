"""Which client a request comes from: its key, or the address that connects, or the one that trusted proxies report.

uvicorn's own middleware reads X-Forwarded-For alone, takes a network that is misspelt without a word, and does not know a proxy whose IPv4
address reaches a dual-stack socket as ::ffff:10.0.0.1.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.server.settings import Header

Address = IPv4Address | IPv6Address
LONGEST = 64
"""Characters of an address with its port; no longer text is parsed."""
MOST_HOPS = 32
"""Proxies in a row that are believed."""
LONGEST_HEADER = 8192
"""Characters of a Forwarded header that is read; proxies allow no more."""
IPV6_PREFIX = 64
"""Bits of an IPv6 address that name a client: whoever has one address of a /64 has all of them."""
UNKNOWN = "unknown"

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
QUOTED = r'"(?:[^"\\]|\\.)*"'
PAIR = re.compile(rf"[ \t]*({TOKEN})=({TOKEN}|{QUOTED})[ \t]*(;|,|\Z)")
HOST = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f]*:[0-9A-Fa-f:.]+)\]|(?P<v4>[0-9.]+))(?::[0-9]{1,5})?|(?P<bare>[0-9A-Fa-f]*:[0-9A-Fa-f:.]+)(?:%[\w.-]+)?"
)


def networks(texts: Sequence[str]) -> tuple[IPv4Network | IPv6Network, ...]:
    """Return the networks of proxies that may be believed; raise EbjdatError that names the one that is none."""
    found = []
    for text in texts:
        try:
            network = ip_network(text.strip())
        except ValueError as error:
            raise EbjdatError(f"trusted proxy {text!r} is neither an address nor a network such as 10.0.0.0/8: {error}") from None
        if not network.prefixlen:
            raise EbjdatError(f"trusted proxy {text!r} is everybody: each client could say that it is another; name the proxies")
        found.append(network)
    return tuple(found)


def parse_address(text: str) -> Address | None:
    """Return the address in ``text``, which may have a port; None if there is none.

    IPv4 in IPv6 is IPv4, and a zone (fe80::1%eth0) is dropped: neither may make one client two.
    """
    return _parse(text) if len(text) <= LONGEST else None


@lru_cache(4096)
def _parse(text: str) -> Address | None:
    if not (match := HOST.fullmatch(text)):
        return None
    try:
        address = ip_address(match["v6"] or match["v4"] or match["bare"])
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


@lru_cache(4096)
def network_name(address: Address | None) -> str:
    """Return the name of the client at ``address``: the address, or the /64 of an IPv6 one."""
    if address is None:
        return UNKNOWN
    if isinstance(address, IPv4Address):
        return str(address)
    return str(IPv6Network((address, IPV6_PREFIX), strict=False))


def client_name(key: str | None, address: Address | None) -> str:
    """Return the name under which a client's work is counted: its key's, else its network's; no key is called like a network."""
    return f"key:{key}" if key else network_name(address)


class ClientAddress:
    """Finds the client's address. Headers are read only if the peer is a trusted proxy, and only the one header that proxies here set.

    The other header would be the client's own, passed on by a proxy that does not know it.
    """

    def __init__(self, trusted: Sequence[str] = (), header: Header = "x-forwarded-for") -> None:
        """Trust the proxies in ``trusted``, addresses or networks; raise EbjdatError for what is neither."""
        self._trusted = networks(trusted)
        self._header = header.encode()

    def __call__(self, peer: str | None, headers: Iterable[tuple[bytes, bytes]]) -> Address | None:
        """Return the address of the client behind ``peer``, the other end of the connection; None if that has none.

        ``headers`` are the request's, names in lower case. The report of the nearest proxy is believed, and the one before if that names
        a trusted proxy, and so on. The first address that is none of ours is the client; a report that is no address ends the walk at
        the proxy that made it.
        """
        address = parse_address(peer) if peer else None
        if address is None or not self._trusts(address):
            return address
        for hops, text in enumerate(self._reported([value for name, value in headers if name == self._header])):
            reported = parse_address(text)
            if reported is None or hops >= MOST_HOPS:
                return address
            address = reported
            if not self._trusts(address):
                return address
        return address

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)

    def _reported(self, values: list[bytes]) -> Iterator[str]:
        """Yield what proxies said of whom they heard, the nearest first; something that is no address where a value is malformed."""
        for value in reversed(values):
            text = value.decode("latin-1")
            if self._header == b"forwarded":
                yield from reversed(forwarded_for(text) or [UNKNOWN])
                continue
            while text:
                text, _, last = text.rpartition(",")
                yield last.strip(" \t")


def forwarded_for(text: str) -> list[str] | None:
    """Return the ``for`` of each element of one Forwarded header (RFC 7239), "" where an element has none; None if it is malformed."""
    if not text or len(text) > LONGEST_HEADER or text.rstrip(" \t")[-1:] in ",;":
        return None
    elements, pairs, place = [], dict[str, str](), 0
    while place < len(text):
        match = PAIR.match(text, place)
        if not match or match[1].lower() in pairs:
            return None
        value = match[2]
        pairs[match[1].lower()] = re.sub(r"\\(.)", r"\1", value[1:-1]) if value[0] == '"' else value
        place = match.end()
        if match[3] != ";":
            elements.append(pairs.get("for", ""))
            pairs = {}
    return elements
