"""How much of a mesh one answer may hold."""

import pytest
from pydantic import ValidationError

from tars.messages.mesh_state import MOST_NODES, SHOWN_NODES, MeshParams


def test_a_page_of_nodes_is_the_default_and_a_thousand_the_most():
    assert MeshParams().most_nodes == SHOWN_NODES == 50
    assert MeshParams(most_nodes=MOST_NODES).most_nodes == 1000


@pytest.mark.parametrize(
    "wrong", [{"most_nodes": 0}, {"most_nodes": 1001}, {"node": ""}, {"node": "n" * 1000}, {"more": 1}]
)
def test_what_is_out_of_bounds_is_refused(wrong):
    with pytest.raises(ValidationError):
        MeshParams.model_validate(wrong)
