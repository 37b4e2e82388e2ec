from __future__ import annotations

import pytest

from tars.errors import InvalidParams
from tars.messages.inference import EmbedParams
from tars.workers.embedding_prompts import dimensions_for, prompt_for

E5 = {"query": "query: ", "passage": "passage: "}
NOMIC = {"search_query": "search_query: ", "search_document": "search_document: "}
# What sentence-transformers makes of a model that names none.
EMPTY: dict[str, str | None] = {"query": "", "document": ""}


@pytest.mark.parametrize(
    ("params", "prompts", "default", "prefix"),
    [
        ({}, E5, None, ""),
        ({}, E5, "passage", "passage: "),
        ({}, E5, "missing", ""),
        ({"input_type": "query"}, E5, "passage", "query: "),
        ({"input_type": "passage"}, E5, None, "passage: "),
        ({"input_type": "query"}, NOMIC, None, "search_query: "),
        ({"input_type": "passage"}, {**EMPTY, **NOMIC}, None, "search_document: "),
        ({"input_type": "passage"}, {"document": "doc: "}, None, "doc: "),
        ({"input_type": "query"}, EMPTY, None, ""),
        ({"input_type": "query"}, {}, None, ""),
        ({"prompt": "mine: "}, E5, "passage", "mine: "),
        ({"prompt": ""}, E5, "passage", ""),
    ],
)
def test_which_prefix_goes_before_a_text(
    params: dict[str, str], prompts: dict[str, str | None], default: str | None, prefix: str
) -> None:
    work = EmbedParams.model_validate({"input": "x", **params})
    assert prompt_for(work, prompts, default) == prefix


def test_dimensions_are_the_models_or_fewer() -> None:
    assert dimensions_for(EmbedParams(input="x"), 384) == 384
    assert dimensions_for(EmbedParams(input="x", dimensions=64), 384) == 64
    with pytest.raises(InvalidParams, match="384 dimensions; 385"):
        dimensions_for(EmbedParams(input="x", dimensions=385), 384)


def test_binary_output_needs_whole_bytes_also_of_the_models_own_dimensions() -> None:
    assert dimensions_for(EmbedParams(input="x", output_type="binary"), 384) == 384
    with pytest.raises(InvalidParams, match="dimensions: 96"):
        dimensions_for(EmbedParams(input="x", output_type="binary"), 100)
