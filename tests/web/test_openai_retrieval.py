"""Requests for embeddings and reranking, and what TARS makes of them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tars.errors import InvalidParams
from tars.messages.inference import EmbedParams, RerankParams
from tars.web.openai_retrieval import EmbeddingRequest, RerankRequest


def embed(**fields):
    return EmbeddingRequest.model_validate({"input": "a", **fields}).to_params()


def rerank(**fields):
    return RerankRequest.model_validate({"query": "q", "documents": ["a"], **fields}).to_params()


def test_every_wish_of_inference_embed_can_be_said():
    assert set(EmbeddingRequest.model_fields) == set(EmbedParams.model_fields)
    said = {"model": "m", "encoding_format": "base64", "dimensions": 8, "overflow": "mean", "input_type": "query"}
    assert embed(**said) == EmbedParams(input="a", **said)
    assert embed(prompt="", truncate=False) == EmbedParams(input="a", prompt="", truncate=False)
    assert embed(user="u", dimensions=None) == EmbedParams(input="a")


@pytest.mark.parametrize("output_type", ["int8", "binary"])
def test_small_vectors_are_never_asked_for_as_base64(output_type):
    params = embed(output_type=output_type, encoding_format="base64")
    assert (params.output_type, params.encoding_format) == (output_type, "float")
    assert embed(output_type="float", encoding_format="base64").encoding_format == "base64"


@pytest.mark.parametrize("given", [[1, 2], [[1], [2]]])
def test_token_ids_are_refused(given):
    with pytest.raises(InvalidParams, match="another vocabulary"):
        embed(input=given)


def test_every_wish_of_inference_rerank_can_be_said():
    assert set(RerankRequest.model_fields) == set(RerankParams.model_fields)
    said = {"model": "m", "top_n": 3, "return_documents": True, "truncate": False}
    assert rerank(**said) == RerankParams(query="q", documents=["a"], **said)


def test_texts_may_stand_in_objects():
    params = rerank(query={"text": "q"}, documents=["a", {"text": "b", "title": "B"}])
    assert (params.query, params.documents) == ("q", ["a", "b"])


@pytest.mark.parametrize("documents", [[{"title": "b"}], [{"text": 5}], [5], "a", None])
def test_what_has_no_text_is_refused(documents):
    with pytest.raises((ValidationError, InvalidParams)):
        rerank(documents=documents)
