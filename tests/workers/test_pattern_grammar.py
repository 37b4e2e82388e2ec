"""A JSON schema's `pattern` as a grammar rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.errors import BadGrammar
from tars.workers.pattern_grammar import NESTING_MOST, PATTERN_MOST, REPETITION_MOST, pattern_rule


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        ("^ab$", '"a" "b"'),
        ("a|b", '"a" | "b"'),
        ("(?:ab)+?", '("a" "b")+'),
        ("[a-c_]{2,3}", "[a-c\\U0000005F]{2,3}"),
        ('"', '"\\U0000005C\\U00000022"'),
        (r"\d\w", "[0-9] [0-9A-Za-z_]"),
        (r"\.", '"\\U0000002E"'),
        ("", '""'),
    ],
)
def test_patterns_become_rules(pattern: str, rule: str) -> None:
    assert pattern_rule(pattern) == rule


@given(st.text('ab()[]{}|^$\\d-?*+.,0129:=!<"', max_size=20))
def test_any_pattern_is_a_rule_or_a_bad_grammar(pattern: str) -> None:
    try:
        pattern_rule(pattern)
    except BadGrammar:
        return


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("a" * (PATTERN_MOST + 1), "shorter"),
        ("(" * (NESTING_MOST + 2) + ")" * (NESTING_MOST + 2), "groups within groups"),
        (f"a{{{REPETITION_MOST + 1}}}", "repetition"),
        ("(?=a)b", "look-around"),
        ("a)", "bracket"),
    ],
)
def test_what_a_grammar_cannot_say_is_refused_by_name(pattern: str, reason: str) -> None:
    with pytest.raises(BadGrammar, match=reason):
        pattern_rule(pattern)
