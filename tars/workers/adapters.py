"""LoRA adapters: small changes of a model's weights that a call chooses, loaded beside the model.

Law of this file: native adapters and which of them a context computes with; cells that were computed with another one are the `kv_cache`'s
business, and who may be computed together the `batcher`'s. Belongs to the engine thread.

llama.cpp adds scale * alpha / rank * B(A x) to what a changed tensor computes (llama-graph.cpp, build_lora_mm): the weights themselves stay
as they are, so that a switch costs a new graph and no copy (measured: 1.2 ms with 3 layers), and the same set again costs nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

from llama_cpp import llama_cpp as api

from tars.errors import BadModelFile, DoesNotFit, ReplicaFailed, UnknownModel
from tars.workers import llama_library as library
from tars.workers.engine import AdapterSpec
from tars.workers.llama_context import Context
from tars.workers.llama_model import Model, load_error
from tars.workers.llama_sampling import check_finite


class Adapters:
    """The adapters of one model, by name; the empty name is the model as it is."""

    def __init__(self, model: Model, specs: Sequence[AdapterSpec], log: library.NativeLog) -> None:
        """Load them, before a context is made: it makes room for their part of the graph.

        Raises `BadModelFile`, which names the adapter, for a file that is no LoRA adapter of this model, and `DoesNotFit`.
        """
        self._scales = {spec.name: spec.scale for spec in specs}
        self._pointers: dict[str, api.llama_adapter_lora_p_ctypes] = {}
        self._used = ""
        for spec in specs:
            log.lines.clear()
            pointer = api.llama_adapter_lora_init(model.pointer, spec.path.encode())
            if not pointer:
                self.close()
                raise _refused(spec.name, log)
            self._pointers[spec.name] = pointer
            if api.llama_adapter_get_alora_n_invocation_tokens(pointer):
                self.close()
                raise BadModelFile(
                    f"The adapter {spec.name} works only after certain words of a prompt (an activated LoRA), which TARS cannot do. "
                    "Use a plain LoRA adapter, or take it out of `adapters`."
                )

    @property
    def names(self) -> list[str]:
        """In the order of the configuration."""
        return list(self._scales)

    @property
    def used(self) -> str:
        """The one that the next decode computes with."""
        return self._used

    def use(self, context: Context, name: str) -> None:
        """Let the context's next decodes compute with this one."""
        if name == self._used:
            return
        chosen = [self._pointers[name]] if name else []
        pointers = (api.llama_adapter_lora_p_ctypes * 1)(*chosen)
        scales = (ctypes.c_float * 1)(*([self._scales[name]] if name else []))
        if api.llama_set_adapters_lora(context.pointer, pointers, len(chosen), scales) != 0:
            raise RuntimeError(f"llama_set_adapters_lora refused the adapter {name}")
        self._used = name

    def try_out(self, context: Context, token: int) -> None:
        """Compute a token with each of them in the (empty) context, so that what is wrong shows at load and not in somebody's answer."""
        for name in self.each(context):
            try:
                check_finite(context.decode([token], [0], [0], [0])[0])
            except ReplicaFailed:
                raise BadModelFile(
                    f"With the adapter {name} the model computes something that is not a number: the adapter's file is damaged, or its "
                    "scale too large. Copy or download it again, or take it out of `adapters`."
                ) from None
            finally:
                context.forget(0, 0)

    def each(self, context: Context) -> Iterator[str]:
        """Let the context compute with the model as it is, then with each adapter; afterwards with the model as it is."""
        for name in ("", *self._scales):
            self.use(context, name)
            yield name
        self.use(context, "")

    def close(self) -> None:
        """Free them; no context may use them any more, and the model must still be there."""
        for pointer in self._pointers.values():
            api.llama_adapter_lora_free(pointer)
        self._pointers.clear()


def adapter_of(asked: str | None, model: str, names: Sequence[str]) -> str:
    """Which adapter a call names that asks for the model `asked` (`<model>:<adapter>`); the empty name where none.

    Raises `UnknownModel` where this model has adapters and that one is not among them. Names and aliases of models may hold colons too, so
    anything else is the model itself: whoever sent the call here has looked it up.
    """
    if asked is None or asked == model:
        return ""
    base, colon, name = asked.rpartition(":")
    if colon and name in names:
        return name
    if colon and base == model and names:
        raise UnknownModel(
            f"{model} has no adapter {name[:100]!r} on this replica; it has {', '.join(names)}. Name one of these after the colon."
        )
    return ""


def _refused(name: str, log: library.NativeLog) -> BadModelFile | DoesNotFit:
    error = load_error(log.lines)
    if isinstance(error, DoesNotFit):
        return DoesNotFit(
            f"The device ran out of memory while the adapter {name} was loaded. Free some, or take it out of `adapters`."
        )
    return BadModelFile(
        f"llama.cpp refused the adapter {name}: its file is missing, damaged, no LoRA adapter, or one of another model. The worker's lines "
        "in the node's log say why. Use a GGUF adapter that was trained on this model, or take it out of `adapters`."
    )
