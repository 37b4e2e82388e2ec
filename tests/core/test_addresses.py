"""Which addresses a node tells others, and in which order another one tries them."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.core.addresses import (
    FAILURE_SECONDS,
    LONGEST_FAILURE_SECONDS,
    MOST_ADVERTISED,
    MOST_KNOWN,
    SEEN_SECONDS,
    TRUST_SECONDS,
    InterfaceAddress,
    PeerAddresses,
    Reach,
    Viewer,
    is_virtual,
    join,
    own_addresses,
    parse,
)


def interfaces(*lines):
    """`eth0 192.168.1.5/24` and so on."""
    return tuple(InterfaceAddress(*line.split()) for line in lines)


LOOPBACK = interfaces("lo 127.0.0.1/8", "lo ::1/128")
PC = (
    *LOOPBACK,
    *interfaces(
        "docker0 172.17.0.1/16",
        "eth0 192.168.1.5/24",
        "eth0 fe80::5%eth0/64",
        "eth0 fd12:3456::5/64",
        "eth0 2a01:db8:1::5/64",
        "tailscale0 100.101.102.103/32",
        "tailscale0 fd7a:115c:a1e0::5/128",
        "vEthernet(WSL) 172.30.16.1/20",
    ),
)
HOME = Viewer.of(
    interfaces("lo 127.0.0.1/8", "docker0 172.17.0.1/16", "wlan0 192.168.1.9/24", "wlan0 fe80::9%wlan0/64")
)
TRAVELLER = Viewer.of(interfaces("wlan0 10.20.30.40/16", "tailscale0 100.77.77.77/32"))
ALONE = Viewer.of(LOOPBACK)


# --- one address ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("192.168.1.5:8001", "192.168.1.5:8001"),
        ("Box.LAN.:1", "box.lan:1"),
        ("my_pc:8001", "my_pc:8001"),
        ("[FD00:0:0::5]:65535", "[fd00::5]:65535"),
        ("[fe80::1%eth0]:8001", "[fe80::1%eth0]:8001"),
        ("[::ffff:10.0.0.7]:8001", "10.0.0.7:8001"),
    ],
)
def test_an_address_has_one_spelling(text, meant):
    assert str(parse(text)) == meant
    assert parse(meant) == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":8001",
        "192.168.1.5",
        "192.168.1.5:",
        "192.168.1.5:0",
        "192.168.1.5:65536",
        "192.168.1.5:+80",
        "192.168.1.5:٨٠",
        "192.168.1:8001",
        "1.2.3.4.5:8001",
        "fd00::5:8001",
        "[fd00::5:8001",
        "[192.168.1.5]:8001",
        "a b:8001",
        "a/b:8001",
        "user@box:8001",
        "-box:8001",
        "box..lan:8001",
        "ü.lan:8001",
        "b" * 64 + ":8001",
        "a." * 200 + "lan:8001",
    ],
)
def test_what_is_no_address_is_refused_with_the_right_form(text):
    with pytest.raises(ValueError, match=r'is not host:port, such as "192\.168\.1\.5:8001"'):
        parse(text)


@given(st.text(max_size=300))
def test_any_text_is_an_address_or_a_clear_error(text):
    with suppress(ValueError):
        endpoint = parse(text)
        again = parse(str(endpoint))
        assert again == endpoint


def test_join_writes_brackets_around_ipv6():
    assert join("fd00::5", 8001) == "[fd00::5]:8001"
    assert join("192.168.1.5", 8001) == "192.168.1.5:8001"


@pytest.mark.parametrize(
    ("name", "virtual"),
    [
        ("docker0", True),
        ("br-0123456789ab", True),
        ("veth12ab", True),
        ("virbr0", True),
        ("vEthernet (WSL)", True),
        ("bridge100", True),
        ("br0", False),
        ("br-lan", False),
        ("bridge0", False),
        ("eth0", False),
        ("tailscale0", False),
        ("wg0", False),
    ],
)
def test_bridges_to_containers_are_told_from_bridged_lans(name, virtual):
    assert is_virtual(name) is virtual


# --- what a node tells of itself --------------------------------------------------------------------------------------


def test_on_all_ipv4_addresses_the_lan_comes_first_and_container_bridges_last():
    assert own_addresses("0.0.0.0", 8001, PC) == (
        "192.168.1.5:8001",
        "100.101.102.103:8001",
        "172.17.0.1:8001",
        "172.30.16.1:8001",
    )


def test_on_all_ipv6_addresses_nothing_link_local_is_told():
    assert own_addresses("::", 8001, PC) == (
        "[fd12:3456::5]:8001",
        "[2a01:db8:1::5]:8001",
        "[fd7a:115c:a1e0::5]:8001",
    )


def test_what_the_operator_says_wins_in_his_order():
    manual = ("Box.example.org:9001", "192.168.1.77:8001", "box.example.org:9001")
    assert own_addresses("0.0.0.0", 8001, PC, manual) == ("box.example.org:9001", "192.168.1.77:8001")


@pytest.mark.parametrize(
    ("listen", "told"),
    [
        ("127.0.0.1", "127.0.0.1:8001"),
        ("192.168.1.5", "192.168.1.5:8001"),
        ("::1", "[::1]:8001"),
        ("box.lan", "box.lan:8001"),
    ],
)
def test_a_node_on_one_address_tells_that_one(listen, told):
    assert own_addresses(listen, 8001, PC) == (told,)


@pytest.mark.parametrize(("listen", "told"), [("0.0.0.0", "127.0.0.1:8001"), ("::", "[::1]:8001")])
@pytest.mark.parametrize("present", [LOOPBACK, ()])
def test_loopback_is_told_only_where_there_is_nothing_else(listen, told, present):
    assert own_addresses(listen, 8001, present) == (told,)
    assert told not in own_addresses(listen, 8001, PC)


def test_two_pcs_on_one_cable_without_dhcp_tell_their_link_local_ipv4():
    assert own_addresses("0.0.0.0", 8001, interfaces("eth0 169.254.7.7/16")) == ("169.254.7.7:8001",)


def test_temporary_addresses_do_not_crowd_out_the_others():
    many = interfaces(*(f"eth0 2a01:db8:1::{n:x}/64" for n in range(1, 20)), "eth1 fd00::1/64")
    told = own_addresses("::", 8001, many)
    assert len(told) == 3
    assert told[0] == "[fd00::1]:8001"
    everywhere = interfaces(*(f"eth{n} 10.0.{n}.1/24" for n in range(40)))
    assert len(own_addresses("0.0.0.0", 8001, everywhere)) == MOST_ADVERTISED


def test_the_order_of_the_systems_list_does_not_matter():
    assert own_addresses("0.0.0.0", 8001, reversed(PC)) == own_addresses("0.0.0.0", 8001, PC)


# --- how a viewer reaches them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("viewer", "address", "reach"),
    [
        (HOME, "192.168.1.5:1", Reach.SAME_NETWORK),
        (HOME, "192.168.2.5:1", Reach.ROUTED),
        (HOME, "172.17.0.2:1", Reach.ROUTED),  # his docker0 is not mine
        (HOME, "100.101.102.103:1", Reach.UNLIKELY),
        (HOME, "[fd00::5]:1", Reach.UNLIKELY),  # only link-local IPv6 here
        (HOME, "[fe80::5%wlan0]:1", Reach.SAME_NETWORK),
        (HOME, "[fe80::5]:1", Reach.UNLIKELY),
        (HOME, "127.0.0.1:1", Reach.UNLIKELY),
        (HOME, "169.254.1.1:1", Reach.UNLIKELY),
        (HOME, "203.0.113.7:1", Reach.ROUTED),
        (HOME, "box.lan:1", Reach.TAILNET),
        (TRAVELLER, "100.101.102.103:1", Reach.TAILNET),
        (TRAVELLER, "192.168.1.5:1", Reach.ROUTED),
        (ALONE, "127.0.0.1:1", Reach.SAME_NETWORK),
        (Viewer(), "100.101.102.103:1", Reach.ROUTED),
    ],
)
def test_how_likely_a_viewer_reaches_an_address(viewer, address, reach):
    assert viewer.reach(parse(address)) is reach


def test_who_sits_on_the_same_lan_takes_it_and_who_travels_takes_the_tailnet():
    told = own_addresses("0.0.0.0", 8001, PC)
    peer = PeerAddresses()
    peer.advertised(told, now=0)
    assert peer.ranked(HOME, now=0)[0] == "192.168.1.5:8001"
    assert peer.ranked(TRAVELLER, now=0)[0] == "100.101.102.103:8001"
    assert set(peer.ranked(TRAVELLER, now=0)) == set(told)


def test_among_equals_the_peers_own_order_counts():
    peer = PeerAddresses()
    peer.advertised(("192.168.1.7:8001", "192.168.1.5:8001"), now=0)
    assert peer.ranked(HOME, now=0) == ("192.168.1.7:8001", "192.168.1.5:8001")


def test_what_this_nodes_operator_named_comes_first_in_his_order():
    peer = PeerAddresses()
    peer.advertised(("192.168.1.5:8001",), now=0)
    peer.manual(("b.example.org:8001", "a.example.org:8001", "192.168.1.5:8001"), now=0)
    assert peer.ranked(HOME, now=0) == ("b.example.org:8001", "a.example.org:8001", "192.168.1.5:8001")
    # What the peer says takes nothing away from what the operator said.
    peer.advertised(("192.168.1.6:8001",), now=1)
    assert peer.ranked(HOME, now=1)[:3] == ("b.example.org:8001", "a.example.org:8001", "192.168.1.5:8001")


# --- what happens there -----------------------------------------------------------------------------------------------

LAN, TAILNET = "192.168.1.5:8001", "100.101.102.103:8001"


def at_home():
    peer = PeerAddresses()
    peer.advertised((LAN, TAILNET), now=0)
    return peer


def test_an_address_that_fails_goes_last_and_comes_back():
    peer = at_home()
    peer.failed(LAN, now=100)
    assert peer.ranked(HOME, now=100) == (TAILNET, LAN)
    assert peer.ranked(HOME, now=100 + FAILURE_SECONDS - 0.1) == (TAILNET, LAN)
    assert peer.ranked(HOME, now=100 + FAILURE_SECONDS) == (LAN, TAILNET)


def test_each_failure_in_a_row_doubles_the_wait_up_to_a_bound():
    peer = at_home()
    now, waits = 100.0, []
    for _ in range(9):
        peer.failed(LAN, now)
        began = now
        while peer.ranked(HOME, now)[0] == TAILNET:
            now += FAILURE_SECONDS / 2
        waits.append(now - began)
    assert waits[:4] == [FAILURE_SECONDS, 2 * FAILURE_SECONDS, 4 * FAILURE_SECONDS, 8 * FAILURE_SECONDS]
    assert waits[-1] == waits[-2] == LONGEST_FAILURE_SECONDS


def test_a_success_forgives_the_failures():
    peer = at_home()
    for now in (100, 120, 160):
        peer.failed(LAN, now)
    peer.succeeded(LAN, now=161)
    assert peer.ranked(HOME, now=161) == (LAN, TAILNET)
    peer.failed(LAN, now=162)
    assert peer.ranked(HOME, now=162 + FAILURE_SECONDS)[0] == LAN


def test_failures_of_long_ago_do_not_count():
    peer = at_home()
    for now in (100, 120, 160):
        peer.failed(LAN, now)
    later = 160 + 2 * LONGEST_FAILURE_SECONDS + 1
    peer.failed(LAN, later)
    assert peer.ranked(HOME, now=later + FAILURE_SECONDS)[0] == LAN


def test_what_answered_goes_before_what_was_never_tried_until_the_best_gets_another_chance():
    peer = at_home()
    peer.succeeded(TAILNET, now=100)
    assert peer.ranked(HOME, now=100) == (TAILNET, LAN)
    peer.succeeded(TAILNET, now=100 + TRUST_SECONDS - 1)
    assert peer.ranked(HOME, now=100 + TRUST_SECONDS) == (LAN, TAILNET)
    # The chance failed: the one that answers keeps its place for another while.
    peer.failed(LAN, now=100 + TRUST_SECONDS)
    peer.succeeded(TAILNET, now=100 + TRUST_SECONDS)
    assert peer.ranked(HOME, now=100 + TRUST_SECONDS + FAILURE_SECONDS) == (TAILNET, LAN)


def test_of_two_that_answer_the_more_direct_one_is_taken():
    peer = at_home()
    peer.succeeded(TAILNET, now=100)
    peer.succeeded(LAN, now=101)
    assert peer.ranked(HOME, now=102) == (LAN, TAILNET)


def test_where_all_fail_they_take_turns():
    peer = at_home()
    tried = []
    for now in range(100, 106):
        first = peer.ranked(HOME, now)[0]
        tried.append(first)
        peer.failed(first, now)
    assert tried == [LAN, TAILNET] * 3


def test_a_new_network_forgives_everything():
    peer = at_home()
    peer.failed(LAN, now=100)
    peer.succeeded(TAILNET, now=100)
    peer.forgive()
    assert peer.ranked(HOME, now=100) == (LAN, TAILNET)


def test_an_address_that_the_peer_no_longer_names_goes_unless_it_works():
    peer = at_home()
    peer.succeeded(TAILNET, now=1)
    peer.advertised(("192.168.1.6:8001",), now=2)
    assert peer.ranked(HOME, now=2) == (TAILNET, "192.168.1.6:8001")
    # Nobody names it any more: an hour after its last answer it is gone.
    assert peer.ranked(HOME, now=2 + SEEN_SECONDS) == ("192.168.1.6:8001",)


def test_where_a_peer_answered_is_known_from_then_on():
    peer = PeerAddresses()
    peer.succeeded("192.168.1.8:8001", now=0)
    assert peer.ranked(HOME, now=0) == ("192.168.1.8:8001",)
    peer.seen("192.168.1.8:8001", now=SEEN_SECONDS)
    assert peer.ranked(HOME, now=2 * SEEN_SECONDS) == ("192.168.1.8:8001",)
    assert peer.ranked(HOME, now=2 * SEEN_SECONDS + 1) == ()


def test_a_peer_that_lists_a_thousand_addresses_or_nonsense_is_bounded():
    peer = PeerAddresses()
    peer.manual(("box.lan:8001",), now=0)
    peer.succeeded(LAN, now=0)
    peer.advertised([f"10.0.{n // 256}.{n % 256}:8001" for n in range(1000)], now=1)
    for n in range(1000):
        peer.seen(f"10.1.{n // 256}.{n % 256}:8001", now=2)
    peer.advertised(["", "\udc80:1", "x" * 10_000, "1.2.3.4:0", "10.0.0.1:8001"], now=3)
    ranked = peer.ranked(HOME, now=3)
    assert len(ranked) <= MOST_KNOWN
    assert {"box.lan:8001", LAN, "10.0.0.1:8001"} <= set(ranked)
    peer.failed("nonsense", now=3)
    peer.succeeded("nonsense", now=3)
    assert peer.ranked(HOME, now=3) == ranked


ADDRESSES = st.sampled_from([LAN, TAILNET, "10.9.9.9:1", "box.lan:1", "[fe80::1%eth0]:1", "nonsense"])
STEPS = st.one_of(
    st.tuples(st.just("advertised"), st.lists(ADDRESSES, max_size=4)),
    st.tuples(st.just("manual"), st.lists(ADDRESSES, max_size=2)),
    st.tuples(st.sampled_from(["seen", "succeeded", "failed"]), ADDRESSES),
    st.tuples(st.just("wait"), st.floats(0, 1000)),
)


@given(st.lists(STEPS, max_size=30), st.sampled_from([HOME, TRAVELLER, ALONE, Viewer()]))
def test_whatever_happens_a_peer_keeps_what_is_named_and_ranks_each_once(steps, viewer):
    peer, now, named, manual, answered = PeerAddresses(), 0.0, set(), set(), set()
    for step, value in steps:
        if step == "wait":
            now += value
            continue
        getattr(peer, step)(value, now)
        valid = {each for each in ([value] if isinstance(value, str) else value) if each != "nonsense"}
        if step == "advertised":
            named = valid
        elif step == "manual":
            manual |= valid
        elif step == "succeeded":
            answered |= valid
        ranked = peer.ranked(viewer, now)
        assert len(set(ranked)) == len(ranked)
        assert named | manual <= set(ranked)
        if step == "succeeded" and valid:
            # Only what answered as well goes before what answered just now.
            assert set(ranked[: ranked.index(value)]) <= answered
