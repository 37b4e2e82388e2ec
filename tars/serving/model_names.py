"""From the name in a call to the model that is meant.

Law of this file: a pure function of names; what exists is in its arguments.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from tars.core.types import ModelKind
from tars.errors import InvalidParams, UnknownModel, WrongModelKind
from tars.serving.fleet import ServedModel


def resolve(
    name: str | None,
    kind: ModelKind,
    models: Sequence[ServedModel],
    loadable: Callable[[], Sequence[ServedModel]] = tuple,
) -> ServedModel:
    """The model that `name` (or an alias) means; None means the only deployed one of its kind that can answer.

    `<model>:<adapter>` is the model; which adapter is for the engine to read from the call. A model whose own name holds a colon wins, and
    a deployed one wins over one that a call would have loaded. Raises `UnknownModel`, `WrongModelKind` or, where None is ambiguous,
    `InvalidParams`.
    """
    of_kind = [model for model in models if model.kind is kind]
    if name is None:
        return _only(kind, of_kind, models)
    named = _called(name, models)
    if named is None:
        further = loadable()
        named = _called(name, further) or _with_adapter(name, models) or _with_adapter(name, further)
    if named is not None:
        if named.kind is not kind:
            raise WrongModelKind(
                f"{named.name} is a model for {named.kind.value}, not for {kind.value}"
                + (f"; try {of_kind[0].name}" if of_kind else ""),
                details={"known": [each.name for each in of_kind]},
            )
        return named
    known = [model.name for model in models]
    shown = name[:100]
    near = difflib.get_close_matches(shown, [*known, *(a for m in models for a in m.aliases)], n=1)
    raise UnknownModel(
        f"no model {shown!r} is served here"
        + (f"; did you mean {near[0]!r}?" if near else "; `models.list` shows what is"),
        details={"known": known},
    )


def _only(kind: ModelKind, of_kind: Sequence[ServedModel], models: Sequence[ServedModel]) -> ServedModel:
    usable = [model for model in of_kind if model.unavailable is None] or of_kind
    if len(usable) == 1:
        return usable[0]
    if not of_kind:
        raise UnknownModel(
            f"no {kind.value} model is deployed here; deploy one with `tars deploy MODEL` "
            "or start the node with --model FILE",
            details={"known": [model.name for model in models]},
        )
    names = ", ".join(model.name for model in usable)
    raise InvalidParams(
        f"several {kind.value} models are served here: {names}; say which one in `model`",
        details={"known": [model.name for model in usable]},
    )


def _called(name: str, models: Sequence[ServedModel]) -> ServedModel | None:
    return next((model for model in models if name == model.name or name in model.aliases), None)


def _with_adapter(name: str, models: Sequence[ServedModel]) -> ServedModel | None:
    """The model before the last colon. Raises `UnknownModel` where it has no adapter of the name behind it."""
    base, _, adapter = name.rpartition(":")
    model = _called(base, models)
    if model is None or adapter in model.adapters:
        return model
    known = [f"{base}:{each}" for each in model.adapters]
    raise UnknownModel(
        f"{model.name} has no adapter {adapter[:100]!r}; "
        + (f"it has {', '.join(known)}" if known else "it has none: name one in `adapters` of its [[model]] table"),
        details={"known": known},
    )
