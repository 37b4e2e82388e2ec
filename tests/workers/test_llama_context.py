"""llama.cpp's context: decodes of many sequences, copies, states, aborts."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.model  # importing the module loads llama.cpp


def test_an_abort_flag_is_true_to_c_only_while_it_is_set() -> None:
    from tars.workers.llama_context import AbortFlag

    flag = AbortFlag()
    assert not flag.callback(flag.data)
    flag.set()
    assert flag.callback(flag.data)
    flag.clear()
    assert not flag.callback(flag.data)
