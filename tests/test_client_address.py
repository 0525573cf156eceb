"""Who a client is: nobody but a trusted proxy can say that a request comes from another, whatever its headers hold."""

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.server.read.client_address import MOST_HOPS, ClientAddress, client_name, forwarded_for, network_name, parse_address

PROXY, INNER, CLIENT = "10.0.0.1", "10.0.0.2", "203.0.113.7"
FOR, FORWARDED = b"x-forwarded-for", b"forwarded"
xff = ClientAddress(["10.0.0.0/8", "fd00::/8"])
rfc7239 = ClientAddress(["10.0.0.0/8"], "forwarded")
value = st.binary(max_size=80).map(lambda text: bytes(byte for byte in text if byte not in b"\r\n\0"))
hostile = value | st.sampled_from(
    [
        b"1.2.3.4",
        b"10.0.0.3",
        b"for=1.2.3.4",
        b'for="',
        b'for="\\',
        b"for=1.2.3.4;",
        b",",
        b"unknown",
        b"::1",
        b"for=10.0.0.9, for=10.0.0.8",
    ]
)


@given(st.lists(st.tuples(st.sampled_from([FOR, FORWARDED, b"x-real-ip"]), hostile)))
def test_headers_of_whoever_is_no_proxy_are_not_read(headers):
    for find in (xff, rfc7239, ClientAddress()):
        assert find(CLIENT, headers) == ip_address(CLIENT)


@given(st.lists(hostile, max_size=4), hostile)
def test_what_a_client_writes_before_the_proxy_appends_its_address_changes_nothing(lines, begun):
    assert xff(PROXY, [*[(FOR, line) for line in lines], (FOR, begun + b", " + CLIENT.encode())]) == ip_address(CLIENT)
    assert xff(PROXY, [*[(FOR, line) for line in lines], (FOR, CLIENT.encode())]) == ip_address(CLIENT)  # HAProxy adds a line


@given(st.lists(hostile, max_size=4), hostile)
@example([], b'for="1.2.3.4')
@example([], b'for="1.2.3.4\\')
@example([b'for="'], b'"')
def test_a_forwarded_header_that_a_client_began_leads_to_the_client_or_the_proxy_but_never_to_a_third(lines, begun):
    appended = begun + b", for=" + CLIENT.encode() + b";proto=https"
    found = rfc7239(PROXY, [*[(FORWARDED, line) for line in lines], (FORWARDED, appended)])
    assert found in {ip_address(CLIENT), ip_address(PROXY)}
    alone = rfc7239(PROXY, [*[(FORWARDED, line) for line in lines], (FORWARDED, b"for=" + CLIENT.encode())])
    assert alone == ip_address(CLIENT)


@given(hostile)
def test_the_header_that_the_proxies_here_do_not_set_is_not_read(text):
    assert xff(PROXY, [(FORWARDED, text), (FOR, CLIENT.encode())]) == ip_address(CLIENT)
    assert rfc7239(PROXY, [(FOR, text), (FORWARDED, b"for=203.0.113.7")]) == ip_address(CLIENT)
    assert xff(PROXY, [(FORWARDED, text)]) == ip_address(PROXY)


@given(st.text(max_size=70))
def test_no_text_is_read_as_an_address_that_it_does_not_hold(text):
    found = parse_address(text)
    assert found is None or found == parse_address(str(found))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("203.0.113.7:4711", "203.0.113.7"),
        ("2001:db8::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:4711", "2001:db8::1"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("[::ffff:cb00:7107]:80", "203.0.113.7"),
        ("fe80::1%eth0", "fe80::1"),
    ],
)
def test_an_address_is_read_as_proxies_write_it(text, address):
    assert parse_address(text) == ip_address(address)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unknown",
        "_hidden",
        "localhost",
        "1.2.3",
        "1.2.3.4.5",
        "01.2.3.4",
        "1.2.3.4:",
        "1.2.3.4:x",
        "1.2.3.4%eth0",
        "[1.2.3.4]",
        "[::1",
        "::1]:80",
        "1.2.3.4 5.6.7.8",
        "2001:db8::1%" + "x" * 80,
        "１.2.3.4",
        "1234",
        " 1.2.3.4",
    ],
)
def test_what_is_no_address_is_none(text):
    assert parse_address(text) is None


def test_proxies_in_a_row_are_followed_to_the_first_address_that_is_none_of_ours():
    assert xff(PROXY, [(FOR, b"1.2.3.4, 203.0.113.7, 10.0.0.3,10.0.0.2")]) == ip_address(CLIENT)
    assert xff("::ffff:10.0.0.1", [(FOR, b"203.0.113.7")]) == ip_address(CLIENT)  # a dual-stack socket
    assert xff("fd00::5", [(FOR, b"2001:db8::1")]) == ip_address("2001:db8::1")
    assert rfc7239(
        PROXY, [(FORWARDED, b'for=1.2.3.4, For="203.0.113.7:5";by=10.0.0.3'), (FORWARDED, b"proto=http;for=10.0.0.2")]
    ) == ip_address(CLIENT)


def test_a_report_that_is_no_address_ends_at_the_proxy_that_made_it():
    for text in (b"203.0.113.7, unknown, 10.0.0.2", b"203.0.113.7, , 10.0.0.2", b"203.0.113.7, 1.2.3, 10.0.0.2"):
        assert xff(PROXY, [(FOR, text)]) == ip_address(INNER)
    assert rfc7239(PROXY, [(FORWARDED, b"for=203.0.113.7, for=_hidden, for=10.0.0.2")]) == ip_address(INNER)
    assert rfc7239(PROXY, [(FORWARDED, b"for=203.0.113.7, proto=http")]) == ip_address(PROXY)
    assert xff(PROXY, []) == ip_address(PROXY)


def test_a_client_inside_the_trusted_network_is_itself():
    assert xff(PROXY, [(FOR, b"10.0.0.9")]) == ip_address("10.0.0.9")


def test_hops_are_bounded():
    hops = [f"10.0.0.{i}" for i in range(MOST_HOPS + 20, 0, -1)]
    assert xff(PROXY, [(FOR, f"203.0.113.7, {', '.join(hops)}".encode())]) == ip_address(f"10.0.0.{MOST_HOPS}")


def test_no_peer_is_nobody():
    assert xff(None, [(FOR, b"203.0.113.7")]) is None
    assert xff("a socket", [(FOR, b"203.0.113.7")]) is None


# RFC 7239 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ('for="_gazonk"', ["_gazonk"]),  # the examples of its section 4
        ('For="[2001:db8:cafe::17]:4711"', ["[2001:db8:cafe::17]:4711"]),
        ("for=192.0.2.60;proto=http;by=203.0.113.43", ["192.0.2.60"]),
        ("for=192.0.2.43, for=198.51.100.17", ["192.0.2.43", "198.51.100.17"]),
        ('for=192.0.2.43,for="[2001:db8:cafe::17]"', ["192.0.2.43", "[2001:db8:cafe::17]"]),
        ("proto=https, for=192.0.2.1", ["", "192.0.2.1"]),
        (r'for="a\"b,c;d\\"', [r'a"b,c;d\ '.strip()]),
    ],
)
def test_forwarded_is_read_as_the_rfc_says(text, nodes):
    assert forwarded_for(text) == nodes


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "for",
        "for=",
        "for=1.2.3.4,",
        "for=1.2.3.4;",
        "for=a b",
        'for="a',
        "for=1.2.3.4;for=5.6.7.8",
        "=1.2.3.4",
        "for=[::1]",
        "for=a=b",
        "for=1.2.3.4" + ";x=y" * 9000,
    ],
)
def test_forwarded_that_is_malformed_is_none(text):
    assert forwarded_for(text) is None


node = st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=20)


@given(st.lists(st.tuples(node, st.booleans()), min_size=1, max_size=5))
def test_any_list_of_nodes_is_read_back(nodes):
    elements = []
    for text, more in nodes:
        quoted = text.replace("\\", "\\\\").replace('"', '\\"')
        elements.append(f'for="{quoted}"' + (";proto=https" if more else ""))
    assert forwarded_for(" , ".join(elements)) == [text for text, _ in nodes]


# names -----------------------------------------------------------------------------------------------------------------------


@given(st.ip_addresses(v=6))
def test_all_addresses_of_an_ipv6_network_are_one_client(address):
    if address.ipv4_mapped:
        return
    other = IPv6Address(int(address) ^ 0xFFFF_FFFF_FFFF_FFFF)
    assert network_name(address) == network_name(other)
    assert network_name(IPv6Address(int(address) ^ (1 << 64))) != network_name(address)


@given(st.ip_addresses(v=4), st.ip_addresses(v=4))
def test_an_ipv4_address_is_a_client_however_it_is_written(one, other):
    assert network_name(one) == network_name(parse_address(f"::ffff:{one}"))
    assert (network_name(one) == network_name(other)) == (one == other)


def test_a_key_goes_before_the_address_and_is_no_networks_name():
    assert client_name("shop", IPv4Address(CLIENT)) == "key:shop"
    assert client_name(None, IPv4Address(CLIENT)) == CLIENT
    assert client_name(None, None) == "unknown"


@pytest.mark.parametrize("text", ["10.0.0.0/33", "proxy.example", "10.0.0.1/8", "", "0.0.0.0/0", "::/0"])
def test_a_proxy_that_is_no_network_is_refused_and_named(text):
    with pytest.raises(EbjdatError, match="trusted proxy") as refused:
        ClientAddress(["10.0.0.1", text])
    assert repr(text) in str(refused.value)
