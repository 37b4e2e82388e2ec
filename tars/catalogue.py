"""Which models can be deployed: the built-in list, the configuration's `[[model]]` tables, and files given on the command line.

Law of this file: names to entries, entries to local files. What a file holds is `model_files`' business, where a model goes the planner's.
One bad file never takes the others down: its entry stays, and `resolve` answers with what is wrong.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from tars.builtin_models import QUALITY, UNKNOWN_QUALITY, BuiltinModel, builtin_models, ordered
from tars.config import ModelSource
from tars.core.types import ModelEntry, ModelKind, ModelShape, Variant
from tars.errors import BadModelFile, ConfigError, ModelError, ModelFileMissing, UnknownModel
from tars.model_files import inspect, inspect_folder

log = logging.getLogger(__name__)

MOST_NAME = 200
NEAREST = 3
"""Names offered for an unknown one."""


class Catalogue:
    """Entries by name, and where their files lie on this PC. Not thread-safe: one event loop uses it."""

    def __init__(self) -> None:
        self.entries: dict[str, ModelEntry] = {}
        self._names: dict[str, str] = {}
        """Lower-case name or alias -> entry's name."""
        self._paths: dict[tuple[str, str], Path] = {}
        self._problems: dict[str, Callable[[], object]] = {}
        """Name of an entry whose file cannot be used -> how to look again, which raises the reason."""

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
        it is looked at again on each call, so that a corrected file needs no restart.
        """
        entry = self.find(name)
        if entry is None:
            raise self._unknown(name)
        if entry.name in self._problems:
            self._look_again(entry.name)
        return self.entries[entry.name]

    def path_of(self, entry: ModelEntry, variant: Variant) -> Path | None:
        """The variant's file or folder on this PC; None when it is not (or no longer) here."""
        path = self._paths.get((entry.name, variant.name))
        return path if path is not None and path.exists() else None

    def add_file(
        self,
        path: Path | str,
        name: str | None = None,
        kind: ModelKind | str | None = None,
        *,
        aliases: Iterable[str] = (),
        description: str = "",
    ) -> ModelEntry:
        """Take a GGUF file, or a sentence-transformers folder, as a model (or as one more variant of the model `name`).

        Without a name: the built-in model whose file it is, else the name in its metadata (the file's own name becomes an alias), else the
        file's name. The same path twice is the same entry. Raises `BadModelFile`, `ModelFileMissing`, or `ConfigError` for a kind that the
        file cannot be or a name that is taken by another model.
        """
        path = Path(path).expanduser().absolute()
        wanted = None if kind is None else _kind(kind)
        if path.is_dir():
            if wanted is ModelKind.CHAT:
                raise ConfigError(
                    "the model's path is a folder, which only an embedding model is; a chat model is one .gguf file"
                )
            folder = inspect_folder(path)
            found = wanted or (ModelKind.RERANK if folder.reranker else ModelKind.EMBEDDING)
            variant = Variant("fp32", folder.shape, QUALITY["FP32"], local=True)
            return self._place(path, found, variant, name, _slug(path.name), None, "", aliases, description)
        if wanted not in (None, ModelKind.CHAT):
            raise ConfigError(
                f"the model's path is a file, but its kind is {wanted}: such a model is a sentence-transformers folder"
            )
        file = inspect(path)
        quantisation = file.header.quantisation
        variant = Variant(
            quantisation, file.shape, QUALITY.get(quantisation.upper(), UNKNOWN_QUALITY), file=path.name, local=True
        )
        return self._place(
            path,
            ModelKind.CHAT,
            variant,
            name,
            _slug(path.stem),
            _slug(file.header.name),
            file.header.licence,
            aliases,
            description,
        )

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

        self._try(entry.name, attach)

    def _add_source(self, source: ModelSource) -> None:
        # A kind that nobody wrote is left to the file.
        kind = source.kind if "kind" in source.model_fields_set else None
        path, name = source.path, source.name
        entry = self.find(name)
        if entry is None:
            assumed = kind or (ModelKind.EMBEDDING if path.is_dir() else ModelKind.CHAT)
            entry = self._register(ModelEntry(name, assumed, (), tuple(source.aliases), source.description))
        elif kind is not None and kind is not entry.kind:
            raise ConfigError(
                f"the model {entry.name!r} is of kind {entry.kind}, not {kind}; give this file another name"
            )
        else:
            self._add_aliases(entry.name, source.aliases)

        def attach() -> None:
            self.add_file(path, entry.name, kind, description=source.description)

        self._try(entry.name, attach)

    def _try(self, name: str, attach: Callable[[], object]) -> None:
        try:
            attach()
        except ModelError as error:
            log.warning("the model %s cannot be served now: %s", name, error.message)
            # A model that has another good file is served from that one.
            if not any(self.path_of(self.entries[name], variant) for variant in self.entries[name].variants):
                self._problems[name] = attach

    def _look_again(self, name: str) -> None:
        try:
            self._problems[name]()
        except ModelFileMissing:
            # Known by its counts, it can still be planned for; whoever needs the file asks `path_of`.
            if not self.entries[name].variants:
                raise
        else:
            self._problems.pop(name, None)

    def _place(
        self,
        path: Path,
        kind: ModelKind,
        variant: Variant,
        name: str | None,
        stem: str,
        title: str | None,
        licence: str,
        aliases: Iterable[str],
        description: str,
    ) -> ModelEntry:
        """Put a file that was found good under its name."""
        entry = self.find(name) if name else self._same_file(path, variant)
        if entry is None:
            chosen = name or self._free_name(title, stem)
            more = (stem,) if not name and stem != chosen and stem not in self._names else ()
            entry = self._register(ModelEntry(chosen, kind, (), (*aliases, *more), description or f"From {path.name}."))
        else:
            if not entry.variants:
                # Registered by its name alone: only its file could say that it ranks and does not embed.
                entry = self.entries[entry.name] = replace(entry, kind=kind)
            if entry.kind is not kind:
                raise ConfigError(
                    f"the model {entry.name!r} is of kind {entry.kind}, not {kind}; give this file another name"
                )
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
            licence=entry.licence or licence,
        )
        self.entries[entry.name] = entry
        self._paths[entry.name, variant.name] = path
        self._problems.pop(entry.name, None)
        return entry

    def _same_file(self, path: Path, variant: Variant) -> ModelEntry | None:
        """The entry that has this path already, or that knows a file of this name and these counts."""
        for (name, _), known in self._paths.items():
            if known == path:
                return self.entries[name]
        for entry in self.entries.values():
            for each in entry.variants:
                if each.file == path.name and _counts_of(each.shape) == _counts_of(variant.shape):
                    return entry
        return None

    def _free_name(self, title: str | None, stem: str) -> str:
        for name in (title, stem):
            if name and name not in self._names:
                return name
        raise ConfigError(
            f"another model is called {stem!r} already; give this file a name of its own in a [[model]] table (name, path)"
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
