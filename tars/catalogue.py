"""Which models can be deployed: the built-in list, the configuration's `[[model]]` tables, and files given on the command line.

Law of this file: names to entries, entries to local files. What a file holds is `model_files`' business, where a model goes the planner's.
One bad file never takes the others down: its entry stays, and `resolve` answers with what is wrong.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tars.builtin_models import QUALITY, UNKNOWN_QUALITY, BuiltinModel, builtin_models, ordered
from tars.companion_files import inspect_adapter, inspect_draft
from tars.config import ModelSource
from tars.core.types import Adapter, ModelEntry, ModelKind, ModelShape, Variant
from tars.errors import BadModelFile, ConfigError, ModelError, ModelFileMissing, UnknownModel
from tars.model_files import inspect, inspect_folder

log = logging.getLogger(__name__)

MOST_NAME = 200
NAMELESS = "model"
"""For a file whose name has no letter or digit of ASCII."""
NEAREST = 3
"""Names offered for an unknown one."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What a good file or folder says about its model."""

    kind: ModelKind
    variant: Variant
    stem: str
    """The file's own name as a model's name."""
    title: str = ""
    """The name in its metadata, likewise; empty when there is none."""
    licence: str = ""


@dataclass(frozen=True, slots=True)
class _Problem:
    """Why an entry's file cannot be used, and how to look again once it has changed."""

    error: ModelError
    attach: Callable[[], object]
    places: Callable[[], Sequence[Path]]
    state: object


class Catalogue:
    """Entries by name, and where their files lie on this PC. Not thread-safe: one event loop uses it."""

    def __init__(self) -> None:
        self.entries: dict[str, ModelEntry] = {}
        self._names: dict[str, str] = {}
        """Lower-case name or alias -> entry's name."""
        self._paths: dict[tuple[str, str], Path] = {}
        self._adapters: dict[tuple[str, str], Path] = {}
        self._drafts: dict[str, Path] = {}
        self._problems: dict[str, _Problem] = {}

    @classmethod
    def load(cls, builtin: bool = True, extra: Iterable[ModelSource] = ()) -> Catalogue:
        """The built-in models, then the configuration's. Raises `ConfigError` for names that clash; a bad or missing file of one model
        is logged and kept for `resolve`.
        """
        catalogue = cls()
        if builtin:
            for model in builtin_models():
                catalogue._add_builtin(model)
        for source in extra:
            catalogue._add_source(source)
        return catalogue

    def find(self, name: str) -> ModelEntry | None:
        """The entry of this name or alias (in any case), whether its file is good or not; None when there is none."""
        known = self._names.get(name.lower())
        return None if known is None else self.entries[known]

    def resolve(self, name: str) -> ModelEntry:
        """The entry of this name or alias (in any case).

        Raises `UnknownModel` with the nearest names; `BadModelFile` or `ModelFileMissing` for a configured model whose file cannot be used:
        it is looked at again once it has changed, so that a corrected file needs no restart.
        """
        entry = self.find(name)
        if entry is None:
            raise self._unknown(name)
        if entry.name in self._problems:
            self._look_again(entry.name)
        return self.entries[entry.name]

    def missing(self, entry: ModelEntry) -> ModelError | None:
        """Why a model that should have a file here (a demo model, one of the configuration) has none; None for all others."""
        problem = self._problems.get(entry.name)
        return None if problem is None else type(problem.error)(problem.error.message, details=problem.error.details)

    def path_of(self, entry: ModelEntry, variant: Variant) -> Path | None:
        """The variant's file or folder on this PC; None when it is not (or no longer) here."""
        path = self._paths.get((entry.name, variant.name))
        return path if path is not None and path.exists() else None

    def adapter_path(self, entry: ModelEntry, adapter: Adapter) -> Path:
        """The file of one of the entry's adapters."""
        return self._adapters[entry.name, adapter.name]

    def draft_path(self, entry: ModelEntry) -> Path | None:
        """The file of the entry's draft model; None where it has none."""
        return self._drafts.get(entry.name)

    def add_file(
        self,
        path: Path | str,
        name: str | None = None,
        kind: ModelKind | str | None = None,
        *,
        variant: str | None = None,
        aliases: Iterable[str] = (),
        description: str = "",
    ) -> ModelEntry:
        """Take a GGUF file, or a sentence-transformers folder, as a model (or as one more variant of the model `name`).

        Without a name: the built-in model whose file it is, else the name in its metadata (the file's own name becomes an alias), else the
        file's name. `variant`: what it is called here, where its header may say otherwise. The same path twice is the same entry. Raises
        `BadModelFile`, `ModelFileMissing`, or `ConfigError` for a kind that the file cannot be or a name that is taken by another model.
        """
        path = Path(path).expanduser().absolute()
        found = _look_into(path, None if kind is None else _kind(kind))
        if variant is not None:
            found = replace(found, variant=replace(found.variant, name=variant))
        return self._place(path, found, name, tuple(aliases), description)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _add_builtin(self, model: BuiltinModel) -> None:
        entry, place = self._register(model.entry), model.place
        if place is None:
            return

        def attach() -> None:
            path = place()
            if path is None or not path.exists():
                raise ModelFileMissing(
                    f"{entry.name} comes with TARS, but its file is not in this installation. Run scripts/setup again, or "
                    "`pip install '.[all]'` in the folder of TARS.",
                    details={"model": entry.name},
                )
            self.add_file(path, entry.name, entry.kind)

        self._try(entry.name, attach, lambda: [path for path in (place(),) if path is not None])

    def _add_source(self, source: ModelSource) -> None:
        # A kind that nobody wrote is left to the file.
        kind = source.kind if "kind" in source.model_fields_set else None
        path, name = source.path, source.name
        entry = self.find(name)
        if entry is None:
            assumed = kind or (ModelKind.EMBEDDING if path.is_dir() else ModelKind.CHAT)
            entry = self._register(ModelEntry(name, assumed, (), tuple(source.aliases), source.description))
        elif kind is not None and kind is not entry.kind:
            raise _other_kind(entry, kind)
        else:
            self._add_aliases(entry.name, source.aliases)

        beside = [each.path for each in source.adapters] + ([] if source.draft is None else [source.draft])

        def attach() -> None:
            # First what goes with the model: a model whose adapter is bad is not served without it, for its callers count on it.
            adapters, draft = _companions(source) if beside else ((), None)
            added = self.add_file(path, entry.name, kind, description=source.description)
            self.entries[added.name] = replace(added, adapters=adapters, draft=draft)
            self._adapters.update({(added.name, each.name): each.path.absolute() for each in source.adapters})
            if source.draft is not None:
                self._drafts[added.name] = source.draft.absolute()

        self._try(entry.name, attach, lambda: [path, *beside])

    def _try(self, name: str, attach: Callable[[], object], places: Callable[[], Sequence[Path]]) -> None:
        state = _states(places())
        try:
            attach()
        except ModelError as error:
            log.warning("the model %s cannot be served now: %s", name, error.message)
            # A model that has another good file is served from that one.
            if not any(self.path_of(self.entries[name], variant) for variant in self.entries[name].variants):
                self._problems[name] = _Problem(error, attach, places, state)

    def _look_again(self, name: str) -> None:
        """Attach the file now if it has changed since it was found bad; else raise what was wrong with it."""
        problem = self._problems[name]
        if _states(problem.places()) != problem.state:
            del self._problems[name]
            self._try(name, problem.attach, problem.places)
            if name not in self._problems:
                return
        error = self._problems[name].error
        # Known by its counts, a model can still be planned for; whoever needs its file asks `path_of`.
        if not (isinstance(error, ModelFileMissing) and self.entries[name].variants):
            # A new one each time: an exception that is raised again and again gathers tracebacks.
            raise type(error)(error.message, details=error.details)

    def _place(
        self, path: Path, found: _Found, name: str | None, aliases: tuple[str, ...], description: str
    ) -> ModelEntry:
        """Put a file that was found good under its name."""
        variant = found.variant
        entry = self.find(name) if name else self._same_file(path, variant)
        if entry is None:
            chosen = name or self._free_name(found)
            if not name and found.stem != chosen and found.stem not in self._names:
                aliases = (*aliases, found.stem)
            entry = self._register(
                ModelEntry(chosen, found.kind, (), aliases, description or "A model file of this PC.")
            )
        else:
            if not entry.variants:
                # Registered by its name alone: only its file could say that it ranks and does not embed.
                entry = self.entries[entry.name] = replace(entry, kind=found.kind)
            if entry.kind is not found.kind:
                raise _other_kind(entry, found.kind)
            _check_same_model(entry, variant)
            self._add_aliases(entry.name, aliases)
            entry = self.entries[entry.name]
        old = next((each for each in entry.variants if each.name == variant.name), None)
        if old is not None:
            variant = replace(variant, repo=old.repo, file=old.file or variant.file)
        others = [each for each in entry.variants if each.name != variant.name]
        entry = replace(
            entry,
            variants=ordered([*others, variant]),
            description=entry.description or description,
            licence=entry.licence or found.licence,
        )
        self.entries[entry.name] = entry
        self._paths[entry.name, variant.name] = path
        self._problems.pop(entry.name, None)
        return entry

    def _same_file(self, path: Path, variant: Variant) -> ModelEntry | None:
        """The entry that has this path already, or the built-in one that knows a file of this name and these counts."""
        for (name, _), known in self._paths.items():
            if known == path:
                return self.entries[name]
        for entry in self.entries.values():
            for each in entry.variants:
                if each.repo and each.file == path.name and _counts_of(each.shape) == _counts_of(variant.shape):
                    return entry
        return None

    def _free_name(self, found: _Found) -> str:
        for name in (found.title, found.stem):
            if name and name not in self._names:
                return name
        raise ConfigError(
            f"another model is called {found.stem!r} already; give this file a name of its own in a [[model]] table (name, path)"
        )

    def _register(self, entry: ModelEntry) -> ModelEntry:
        if not entry.name or len(entry.name) > MOST_NAME or not entry.name.isprintable():
            raise ConfigError(f"a model's name must be 1 to {MOST_NAME} printable characters")
        for name in (entry.name, *entry.aliases):
            if name.lower() in self._names:
                raise ConfigError(
                    f"two models are called {name!r}: {self._names[name.lower()]} and {entry.name}; rename one, or drop the alias"
                )
        self.entries[entry.name] = entry
        self._names.update({name.lower(): entry.name for name in (entry.name, *entry.aliases)})
        return entry

    def _add_aliases(self, name: str, aliases: Iterable[str]) -> None:
        for alias in aliases:
            holder = self._names.setdefault(alias.lower(), name)
            if holder != name:
                raise ConfigError(
                    f"two models are called {alias!r}: {holder} and {name}; rename one, or drop the alias"
                )
            entry = self.entries[name]
            if alias != name and alias not in entry.aliases:
                self.entries[name] = replace(entry, aliases=(*entry.aliases, alias))

    def _unknown(self, name: str) -> UnknownModel:
        shown = name if len(name) <= MOST_NAME else name[:MOST_NAME] + "..."
        key = shown.lower()
        close = difflib.get_close_matches(key, sorted(self._names), n=NEAREST, cutoff=0.5)
        # What somebody types is often a part of the name: `mistral`, `phi`.
        parts = [known for known in sorted(self._names) if len(key) > 2 and key in known]
        nearest = list(dict.fromkeys(self._names[each] for each in (*close, *parts)))[:NEAREST]
        hint = f" Did you mean {' or '.join(nearest)}?" if nearest else " `models.list` lists what is known."
        return UnknownModel(
            f"There is no model {shown!r} here.{hint}", details={"known": sorted(self.entries), "nearest": nearest}
        )


def _look_into(path: Path, wanted: ModelKind | None) -> _Found:
    """Inspect a file or a folder; see `Catalogue.add_file` for what is raised."""
    is_folder = path.is_dir() or (wanted not in (None, ModelKind.CHAT) and not path.exists())
    if is_folder:
        if wanted is ModelKind.CHAT:
            raise ConfigError(
                "the model's path is a folder, which only an embedding model is; a chat model is one .gguf file"
            )
        folder = inspect_folder(path)
        return _Found(
            kind=wanted or (ModelKind.RERANK if folder.reranker else ModelKind.EMBEDDING),
            variant=Variant("fp32", folder.shape, QUALITY["FP32"], local=True),
            stem=_slug(path.name) or NAMELESS,
        )
    if wanted not in (None, ModelKind.CHAT):
        raise ConfigError(
            f"the model's path is no folder, but its kind is {wanted}: such a model is a sentence-transformers folder"
        )
    file = inspect(path)
    quantisation = file.header.quantisation
    quality = QUALITY.get(quantisation.upper(), UNKNOWN_QUALITY)
    return _Found(
        kind=ModelKind.CHAT,
        variant=Variant(quantisation, file.shape, quality, file=path.name, local=True),
        stem=_slug(path.stem) or NAMELESS,
        title=_slug(file.header.name),
        licence=file.header.licence,
    )


def _companions(source: ModelSource) -> tuple[tuple[Adapter, ...], ModelShape | None]:
    """The adapters and the draft model of a configured model. Raises `BadModelFile`, or what is wrong with the model's own file."""
    if source.path.is_dir():
        raise ConfigError(
            f"the model {source.name!r} is a folder, and adapters and draft are for chat models, which are .gguf files"
        )
    model = inspect(source.path).header
    adapters = tuple(inspect_adapter(each.name, each.scale, each.path, model) for each in source.adapters)
    return adapters, None if source.draft is None else inspect_draft(source.draft, model)


def _states(paths: Sequence[Path]) -> list[object]:
    return [_state(path) for path in paths]


def _state(path: Path) -> object:
    """Something that changes when the file, or a file in the folder, does; None when there is nothing."""
    try:
        if path.is_dir():
            with os.scandir(path) as rows:
                return sorted((row.name, row.stat().st_size, row.stat().st_mtime_ns) for row in rows)
        found = path.stat()
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns)


def _other_kind(entry: ModelEntry, kind: ModelKind) -> ConfigError:
    return ConfigError(f"the model {entry.name!r} is of kind {entry.kind}, not {kind}; give this file another name")


def _counts_of(shape: ModelShape) -> tuple[object, ...]:
    return (shape.architecture, shape.layers, shape.embedding, shape.heads, shape.kv_heads, shape.feed_forward)


def _check_same_model(entry: ModelEntry, variant: Variant) -> None:
    for other in entry.variants:
        if _counts_of(other.shape) != _counts_of(variant.shape):
            raise BadModelFile(
                f"The file given for {entry.name} holds another model ({variant.shape.architecture}, {variant.shape.layers} layers of "
                f"{variant.shape.embedding}, not {other.shape.architecture}, {other.shape.layers} of {other.shape.embedding}). "
                "Give it a name of its own."
            )


def _kind(kind: ModelKind | str) -> ModelKind:
    try:
        return ModelKind(kind)
    except ValueError:
        known = ", ".join(each.value for each in ModelKind)
        raise ConfigError(f"a model's kind is one of {known}, not {str(kind)[:50]!r}") from None


def _slug(text: str) -> str:
    """A name for URLs and command lines: lower case, `[a-z0-9._-]`; empty when nothing of the text is left."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-._")[:MOST_NAME]
