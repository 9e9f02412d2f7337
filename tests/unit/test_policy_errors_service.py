# SPDX-License-Identifier: Apache-2.0
"""Bad policies: services, kinds, rules and the tables about rings, sockets and the interface."""

from __future__ import annotations

import pytest

from tests.unit.policy_texts import (
    HUGE,
    SERVICE,
    BadPolicy,
    check_refusal,
    kind,
    lane,
    many,
    match,
    peer_class,
    policy,
    rule,
    service,
)
from xdp.policy import Policy

BAD: dict[str, BadPolicy] = {
    # services
    "no_service": (policy(services=""), "service", ["is missing", "at least one [[service]]"]),
    "service_no_name": (policy(services="[[service]]\nports = [1]\n"), "service[0].name", ["is missing"]),
    "service_twice": (
        policy(services=SERVICE + '[[service]]\nname = "tpu"\nports = [1]\n'),
        "service[1].name",
        ["service[0]"],
    ),
    "thirtytwo_services": (
        policy(services=many("service", 32, "ports = [#]")),
        "service",
        ["32", "at most 31"],
    ),
    "no_ports": (service(""), "service[0].ports", ["is missing", "1 to 65535"]),
    "empty_ports": (service("ports = []"), "service[0].ports", ["an empty array"]),
    "ports_number": (service("ports = 53"), "service[0].ports", ["found 53", "an array"]),
    "port_0": (service("ports = [0]"), "service[0].ports[0]", ["found 0", "1 to 65535"]),
    "port_65536": (service("ports = [1, 65536]"), "service[0].ports[1]", ["found 65536"]),
    "port_huge": (service(f"ports = [{HUGE}]"), "service[0].ports[0]", ["a huge number"]),
    "port_range_reversed": (service('ports = ["9-8"]'), "service[0].ports[0]", ['found "9-8"']),
    "port_range_open": (service('ports = ["80-"]'), "service[0].ports[0]", ['found "80-"', "ranges such as"]),
    "port_word": (service('ports = ["domain"]'), "service[0].ports[0]", ['found "domain"']),
    "port_digits": (service('ports = ["٣٤"]'), "service[0].ports[0]", ["1 to 65535"]),
    "port_twice": (service('ports = [8005, "8000-8010"]'), "service[0].ports[1]", ["port 8005", "already"]),
    "port_in_two": (
        policy(services=SERVICE + '[[service]]\nname = "b"\nports = ["8000-8010"]\n'),
        "service[1].ports",
        ["port 8005", 'service "tpu" already'],
    ),
    "service_unknown_key": (service("ports = [1]\nrules = []"), "service[0].rules", ['did you mean "rule"?']),
    # kinds
    "eight_kinds": (
        service("ports = [1]\n" + many("service.kind", 8, 'match = [{ offset = #, value = "00" }]')),
        "service[0].kind",
        ["8 entries", "at most 7"],
    ),
    "seven_kinds_and_heartbeat": (
        service(
            "ports = [1]\n"
            + many("service.kind", 7, 'match = [{ offset = #, value = "00" }]')
            + '[[service.rule]]\nkind = "heartbeat"\naction = "drop"\n'
        ),
        "service[0].kind",
        ["8 kinds", "heartbeat", "at most 7"],
    ),
    "seventeen_patterns": (
        kind("match = [" + ",".join(f'{{ offset = {i}, value = "00" }}' for i in range(17)) + "]"),
        "service[0].kind[0].match",
        ["17 entries", "at most 16"],
    ),
    "seventeen_patterns_in_all": (
        service(
            "ports = [1]\n"
            + "".join(
                f'[[service.kind]]\nname = "k{k}"\nmatch = ['
                + ",".join(f'{{ offset = {k * 9 + i}, value = "00" }}' for i in range(9))
                + "]\n"
                for k in range(2)
            )
        ),
        "service[0].kind",
        ["18 patterns", "at most 16"],
    ),
    "kind_twice": (
        kind(
            'match = [{ offset = 0, value = "01" }]\n'
            '[[service.kind]]\nname = "data"\nmatch = [{ offset = 1, value = "01" }]'
        ),
        "service[0].kind[1].name",
        ["kind[0]"],
    ),
    "kind_heartbeat": (
        service('ports = [1]\n[[service.kind]]\nname = "heartbeat"\nmatch = []'),
        "service[0].kind[0].name",
        ["defined already"],
    ),
    "kind_other": (
        service('ports = [1]\n[[service.kind]]\nname = "other"\nmatch = []'),
        "service[0].kind[0].name",
        ["defined already"],
    ),
    "kind_no_match": (kind(""), "service[0].kind[0].match", ["is missing"]),
    "kind_empty_match": (kind("match = []"), "service[0].kind[0].match", ["an empty array"]),
    "pattern_twice": (
        kind('match = [{ offset = 4, value = "01" }, { offset = 4, mask = "ff", value = "01" }]'),
        "service[0].kind[0].match[1]",
        ["the same pattern", '"data"'],
    ),
    "value_missing": (match("offset = 1"), "service[0].kind[0].match[0].value", ["is missing"]),
    "offset_missing": (match('value = "01"'), "service[0].kind[0].match[0].offset", ["is missing", "8999"]),
    "offset_negative": (
        match('value = "01", offset = -1'),
        "service[0].kind[0].match[0].offset",
        ["found -1"],
    ),
    "offset_high": (
        match('value = "0102", offset = 8999'),
        "service[0].kind[0].match[0].offset",
        ["to 8998"],
    ),
    "value_number": (
        match("value = 90, offset = 0"),
        "service[0].kind[0].match[0].value",
        ["found 90", "hex"],
    ),
    "value_0x": (match('value = "0x90", offset = 0'), "service[0].kind[0].match[0].value", ["hex"]),
    "value_half_byte": (match('value = "9", offset = 0'), "service[0].kind[0].match[0].value", ["hex"]),
    "value_3_bytes": (
        match('value = "010203", offset = 0'),
        "service[0].kind[0].match[0].value",
        ["1, 2, 4 or 8"],
    ),
    "value_9_bytes": (
        match(f'value = "{"00" * 9}", offset = 0'),
        "service[0].kind[0].match[0].value",
        ["1, 2, 4 or 8"],
    ),
    "mask_width": (
        match('value = "9000", mask = "f0", offset = 0'),
        "service[0].kind[0].match[0].mask",
        ["1 bytes", "2"],
    ),
    "mask_zero": (
        match('value = "00", mask = "00", offset = 0'),
        "service[0].kind[0].match[0].mask",
        ["everything"],
    ),
    "value_outside_mask": (
        match('value = "96", mask = "f0", offset = 64'),
        "service[0].kind[0].match[0].value",
        ['"96"', '"f0"', '"90"'],
    ),
    # rules
    "rule_no_action": (rule('lane = "votes"'), "service[0].rule[0].action", ["is missing", '"lane", "pass"']),
    "rule_action": (rule('action = "accept"'), "service[0].rule[0].action", ['found "accept"', '"reply"']),
    "rule_no_lane": (rule('action = "lane"'), "service[0].rule[0].lane", ["is missing"]),
    "rule_lane": (
        rule('action = "lane"\nlane = "vote"'),
        "service[0].rule[0].lane",
        ["votes, shreds, bulk", 'mean "votes"?'],
    ),
    "rule_lane_type": (rule('action = "lane"\nlane = 0'), "service[0].rule[0].lane", ["found 0"]),
    "rule_class": (
        rule('class = "stakd"\naction = "drop"'),
        "service[0].rule[0].class",
        ['"stakd"', 'mean "staked"?'],
    ),
    "rule_class_twice": (
        rule('class = ["staked", "staked"]\naction = "drop"'),
        "service[0].rule[0].class[1]",
        ["twice"],
    ),
    "rule_class_empty": (
        rule('class = []\naction = "drop"'),
        "service[0].rule[0].class",
        ["an empty array", "any"],
    ),
    "rule_class_denied": (
        rule('class = "bad"\naction = "drop"', classes='[[class]]\nname = "bad"\ndeny = true\n'),
        "service[0].rule[0].class",
        ['"bad" is denied'],
    ),
    "rule_kind": (rule('kind = "heart"\naction = "drop"'), "service[0].rule[0].kind", ["heartbeat, other"]),
    "rule_drop_lane": (rule('action = "drop"\nlane = "bulk"'), "service[0].rule[0].lane", ["has no lane"]),
    "rule_pass_rate": (
        rule('action = "pass"\npeer_rate = 5'),
        "service[0].rule[0].peer_rate",
        ["has no peer_rate"],
    ),
    "rule_demote_up": (
        rule('action = "lane"\nlane = "bulk"\npeer_rate = 1\ndemote = "votes"'),
        "service[0].rule[0].demote",
        ["a higher lane", "lowest lane"],
    ),
    "rule_demote_same": (
        rule('action = "lane"\nlane = "shreds"\npeer_rate = 1\ndemote = "shreds"'),
        "service[0].rule[0].demote",
        ["itself", "bulk"],
    ),
    "reply_any_kind": (
        rule('action = "reply"\nlane = "bulk"'),
        "service[0].rule[0].kind",
        ["any kind", '"heartbeat"'],
    ),
    "reply_kinds": (
        rule('action = "reply"\nlane = "bulk"\nkind = ["heartbeat", "other"]'),
        "service[0].rule[0].kind",
        ['"heartbeat", "other"'],
    ),
    "reply_no_lane": (
        rule('action = "reply"\nkind = "heartbeat"'),
        "service[0].rule[0].lane",
        ["is missing"],
    ),
    "reply_over": (
        rule('action = "reply"\nkind = "heartbeat"\nlane = "votes"\ndemote = "bulk"'),
        "service[0].rule[0].demote",
        ["always dropped"],
    ),
    "rules_many": (
        service("ports = [1]\n" + '[[service.rule]]\naction = "drop"\n' * 129),
        "service[0].rule",
        ["129", "128"],
    ),
    "later_index": (
        policy(
            services=many("service", 2, "ports = [#]")
            + '[[service]]\nname = "c"\nports = [9]\n'
            + '[[service.rule]]\naction = "drop"\n[[service.rule]]\naction = "x"\n'
        ),
        "service[2].rule[1].action",
        ['found "x"'],
    ),
    # the rest
    "rings_array": (policy("rings = []"), "rings", ["a table"]),
    "rings_rx": (policy("rings = { rx = 100 }"), "rings.rx", ["found 100", "power of two"]),
    "rings_tx": (policy("rings = { tx = 65536 }"), "rings.tx", ["64 to 32768"]),
    "frame_size": (
        policy("rings = { frame_size = 3000 }"),
        "rings.frame_size",
        ["found 3000", "2048 or 4096"],
    ),
    "frame_size_huge": (policy(f"rings = {{ frame_size = {HUGE} }}"), "rings.frame_size", ["a huge number"]),
    "rings_quota": (policy("rings = { quota = 0 }"), "rings.quota", ["found 0"]),
    "companion_budget": (policy("companion = { budget = 0 }"), "companion.budget", ["found 0", "65536"]),
    "companion_enabled": (policy("companion = { enabled = 1 }"), "companion.enabled", ["true or false"]),
    "owner_user": (policy('owner = { users = ["a b"] }'), "owner.users[0]", ['found "a b"', "user"]),
    "owner_uid": (policy("owner = { users = [-1] }"), "owner.users[0]", ["found -1", "4294967294"]),
    "owner_group": (policy("owner = { groups = [true] }"), "owner.groups[0]", ["found true", "group"]),
    "owner_twice": (policy('owner = { users = ["sol", "sol"] }'), "owner.users[1]", ["twice"]),
    "mode": (policy('interface = { mode = "nativ" }'), "interface.mode", ['did you mean "native"?']),
    "minimum_mode": (
        policy('interface = { minimum_mode = "zero" }'),
        "interface.minimum_mode",
        ["native-zero-copy"],
    ),
    "minimum_above_mode": (
        policy('interface = { mode = "generic", minimum_mode = "native-copy" }'),
        "interface.minimum_mode",
        ["cannot be reached", "generic-copy"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_policy_is_refused_with_file_key_and_what_is_allowed(name: str) -> None:
    check_refusal(name, BAD[name])


def test_the_policies_that_the_bad_ones_are_made_of_are_good() -> None:
    assert Policy.parse(policy()).lane_names == ("votes", "shreds", "bulk")
    Policy.parse(lane("rate = 5\ndemote = 'bulk'\nring = 64\nquota = 1\nshare = 0.5"))
    Policy.parse(peer_class("peer_rate = 1\nprefix_rate = 1\ndemote = 'bulk'"))
    Policy.parse(match('value = "90", mask = "f0", offset = 8999'))
    Policy.parse(rule('class = "staked"\naction = "lane"\nlane = "votes"\npeer_rate = 1\ndemote = "bulk"'))
    Policy.parse(rule('kind = "heartbeat"\naction = "reply"\nlane = "votes"'))
    Policy.parse(policy(lanes=many("lane", 8, "share = 0.125")))
    Policy.parse(policy(classes=many("class", 15) + '[[class]]\nname = "unknown"\n'))
    Policy.parse(policy(services=many("service", 31, "ports = [#]")))
