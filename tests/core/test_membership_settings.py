"""The pace is one number; the proportions are what was thought about."""

from dataclasses import fields

import pytest

from tars.core.membership_settings import MembershipSettings


def test_half_a_second_is_the_default():
    assert MembershipSettings.paced(0.5) == MembershipSettings()


@pytest.mark.parametrize("seconds", [0.05, 2.0])
def test_everything_in_seconds_keeps_its_proportion_and_nothing_else_changes(seconds):
    usual, paced = MembershipSettings(), MembershipSettings.paced(seconds)
    times = (
        {"interval", "direct", "whole", "patience"},
        {
            "shortest_suspicion",
            "longest_suspicion",
            "retry",
            "compare",
        },
    )
    for before, after, scaled in ((usual.probing, paced.probing, times[0]), (usual, paced, times[1])):
        for field in fields(before):
            if field.name != "probing":
                factor = seconds / 0.5 if field.name in scaled else 1
                assert getattr(after, field.name) == pytest.approx(factor * getattr(before, field.name)), field.name


def test_a_dead_node_is_known_within_ten_probes():
    """Ring probe, whole probe, longest suspicion, and two rounds of news."""
    settings = MembershipSettings()
    probing = settings.probing
    assert 2 * probing.interval + probing.whole + settings.longest_suspicion + 0.4 < 10 * probing.interval


def test_a_loop_that_stands_still_for_two_seconds_has_time_to_refute():
    settings = MembershipSettings()
    assert settings.probing.whole + settings.shortest_suspicion > 2.0 + 0.5
