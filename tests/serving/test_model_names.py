"""From the name in a call to the model that is meant."""

import pytest

from tars.core.types import ModelKind
from tars.errors import DoesNotFit, InvalidParams, UnknownModel, WrongModelKind
from tars.serving.fleet import ServedModel
from tars.serving.model_names import resolve

CHAT = ServedModel("chat-model", ModelKind.CHAT, ("chat-alias",))
EMBEDDING = ServedModel("embedder", ModelKind.EMBEDDING, ())
MODELS = (CHAT, EMBEDDING)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("chat-model", ModelKind.CHAT, CHAT),
        ("chat-alias", ModelKind.CHAT, CHAT),
        (None, ModelKind.EMBEDDING, EMBEDDING),
    ],
)
def test_resolves_a_name_an_alias_and_the_only_model_of_a_kind(name, kind, expected):
    assert resolve(name, kind, MODELS) == expected


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(UnknownModel, match="did you mean 'chat-model'") as caught:
        resolve("chat-modle", ModelKind.CHAT, MODELS)
    assert caught.value.details["known"] == ["chat-model", "embedder"]


def test_a_model_of_the_wrong_kind_names_the_right_one():
    with pytest.raises(WrongModelKind, match="try chat-model"):
        resolve("embedder", ModelKind.CHAT, MODELS)


def test_no_name_among_several_models_is_refused_with_their_names():
    with pytest.raises(InvalidParams, match="chat-model, other"):
        resolve(None, ModelKind.CHAT, (CHAT, ServedModel("other", ModelKind.CHAT, ())))


def test_no_name_means_the_only_model_that_can_answer():
    models = (CHAT, ServedModel("big", ModelKind.CHAT, (), DoesNotFit("too big")))
    assert resolve(None, ModelKind.CHAT, models) == CHAT


def test_no_name_and_no_model_says_how_to_get_one():
    with pytest.raises(UnknownModel, match="tars deploy"):
        resolve(None, ModelKind.CHAT, ())


def test_an_unavailable_model_still_resolves_so_that_its_own_reason_can_be_told():
    refused = ServedModel("big", ModelKind.CHAT, (), DoesNotFit("too big"))
    assert resolve("big", ModelKind.CHAT, (refused,)).unavailable.kind == "does_not_fit"


ADAPTED = ServedModel("mistral-7b", ModelKind.CHAT, ("mistral",), adapters=("legal", "polite"))


@pytest.mark.parametrize("name", ["mistral-7b", "mistral-7b:legal", "mistral:polite"])
def test_a_name_with_an_adapter_is_the_model(name):
    assert resolve(name, ModelKind.CHAT, (CHAT, ADAPTED)) == ADAPTED


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mistral:rude", "mistral-7b has no adapter 'rude'; it has mistral:legal, mistral:polite"),
        ("chat-model:legal", "chat-model has no adapter 'legal'; it has none"),
        ("mistral-7b:", "has no adapter ''"),
        ("nobody:legal", "no model 'nobody:legal' is served here"),
        ("mistral-7b:legal:polite", "no model 'mistral-7b:legal:polite' is served here"),
        (":", "no model ':' is served here"),
    ],
)
def test_an_unknown_adapter_is_answered_with_the_known_ones(name, said):
    with pytest.raises(UnknownModel) as caught:
        resolve(name, ModelKind.CHAT, (CHAT, ADAPTED))
    assert caught.value.message.startswith(said) or said in caught.value.message


def test_a_model_whose_own_name_holds_a_colon_wins():
    llama, tagged = (
        ServedModel("llama3", ModelKind.CHAT, (), adapters=("8b",)),
        ServedModel("llama3:8b", ModelKind.CHAT, ()),
    )
    both = (llama, tagged)
    assert resolve("llama3:8b", ModelKind.CHAT, both) == tagged
    assert resolve("llama3:8b", ModelKind.CHAT, (llama,)) == llama
    adapted = ServedModel("llama3:8b", ModelKind.CHAT, (), adapters=("legal",))
    assert resolve("llama3:8b:legal", ModelKind.CHAT, (llama, adapted)) == adapted


def test_an_adapter_does_not_change_what_a_model_is_for():
    with pytest.raises(WrongModelKind):
        resolve("mistral-7b:legal", ModelKind.EMBEDDING, (EMBEDDING, ADAPTED))


ON_DISK = ServedModel("shelved", ModelKind.CHAT, ("old",), adapters=("legal",), deployed=False)


@pytest.mark.parametrize("name", ["shelved", "old", "shelved:legal"])
def test_a_name_that_nobody_deployed_is_looked_for_among_the_files_of_the_mesh(name):
    assert resolve(name, ModelKind.CHAT, MODELS, lambda: (ON_DISK,)) == ON_DISK


def test_files_are_only_looked_at_for_a_name_that_is_not_deployed():
    def loadable():
        raise AssertionError("nobody asked")

    assert resolve("chat-alias", ModelKind.CHAT, MODELS, loadable) == CHAT
    assert resolve(None, ModelKind.CHAT, MODELS, loadable) == CHAT


def test_a_call_without_a_name_never_loads_what_nobody_deployed():
    with pytest.raises(UnknownModel, match="tars deploy"):
        resolve(None, ModelKind.RERANK, MODELS, lambda: (ServedModel("r", ModelKind.RERANK, (), deployed=False),))


def test_a_deployed_alias_wins_over_a_file_of_that_name():
    other = ServedModel("chat-alias", ModelKind.CHAT, (), deployed=False)
    assert resolve("chat-alias", ModelKind.CHAT, MODELS, lambda: (other,)) == CHAT
