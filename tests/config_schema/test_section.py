"""What holds for every table."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tars.config_schema.section import Section
from tars.config_schema.whole import Config


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Config().node.name = "other"  # type: ignore[misc]  # that it is frozen is the point


@pytest.mark.parametrize("fields", [{"seconds": 1.0, "second": 2.0}, {"seconds": "1"}, {"seconds": float("inf")}])
def test_a_table_takes_no_unknown_key_no_other_type_and_no_number_that_is_none(fields: dict[str, object]) -> None:
    class Table(Section):
        seconds: float

    assert Table(seconds=1.0).seconds == 1.0
    with pytest.raises(ValidationError):
        Table.model_validate(fields)
