"""Which prefix goes before a text, and whether a call's asked shape exists in this model.

Law of this file: pure; a model is its table of prompts (`prompts` of config_sentence_transformers.json), its default prompt's name and its
number of dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping

from tars.errors import InvalidParams
from tars.messages.inference import EmbedParams

NAMES: Mapping[str, tuple[str, ...]] = {
    # Names in use: sentence-transformers' own and E5's first, then nomic's, jina's, stella's, snowflake's.
    "query": ("query", "search_query", "retrieval.query", "s2p_query", "web_search_query"),
    "passage": ("passage", "document", "search_document", "retrieval.passage", "corpus", "doc"),
}
"""`input_type` -> names under which models keep that prompt; the first that is not empty counts."""


def prompt_for(work: EmbedParams, prompts: Mapping[str, str | None], default_name: str | None) -> str:
    """What is put before each text of the call.

    `prompt` beats everything (it may be empty), then `input_type`'s prompt (none where the model has none: most need none), then the
    model's default prompt, as `SentenceTransformer.encode` does.
    """
    if work.prompt is not None:
        return work.prompt
    if work.input_type is not None:
        return next((found for name in NAMES[work.input_type] if (found := prompts.get(name))), "")
    return prompts.get(default_name or "") or ""


def dimensions_for(work: EmbedParams, model_dimensions: int) -> int:
    """How many values each vector gets. Raises `InvalidParams` where the model has fewer, or binary output cannot be whole bytes."""
    wanted = work.dimensions or model_dimensions
    if wanted > model_dimensions:
        raise InvalidParams(
            f"This model's vectors have {model_dimensions} dimensions; {wanted} were asked for. Send {model_dimensions} or fewer, or none."
        )
    if work.output_type == "binary" and wanted % 8:
        raise InvalidParams(
            f"Binary output packs eight values into a byte, and {wanted} dimensions are not a multiple of 8. "
            f"Send dimensions: {wanted // 8 * 8 or 8}, or another output_type."
        )
    return wanted
