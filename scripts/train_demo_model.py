#!/usr/bin/env python3
"""Train the offline demo chat model from tars/demo/help_desk.toml and export it as GGUF.

    scripts/train_demo_model.py                  train, examine, write tars/demo/tars-help-desk.gguf
    scripts/train_demo_model.py --continue       go on from the shipped file: for a few answers that changed
    scripts/train_demo_model.py --check-only     examine the shipped file through llama_cpp

The network is a small llama, see demo_network.py.
It is trained from random weights on our own text alone. The same seed, steps, thread count, machine type and library
versions give the same file; other hardware rounds differently and gives another file with the same answers.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from demo_network import HelpDeskModel, Shape
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

from tars.demo import help_desk_gguf
from tars.demo.help_desk import ConversationMaker, HelpDesk, Message, load_help_desk

END_OF_TEXT, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# The bars of the examination: exact, whole right answers.
HELD_OUT_BAR, LESSON_BAR = 0.80, 0.98
NO_LOSS = -100
ROUNDING = 8
# Once the answers are known by heart, many examples show only an answer's opening: what is left to learn is which answer
# it is, and that is decided there. Earlier it does harm (one run each: 44 % right on held-out questions after 500 steps with
# clipping from 12 % on, 59 % without).
CLIPPED_FROM, CLIPPED_SHARE, CLIPPED_TOKENS = 0.4, 0.5, 16
GOES_ON_AT = 0.75
"""Where in a training's course `--continue` begins: the learning rate is two fifths of the highest there and falls."""


# ---------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(help_desk: HelpDesk, shape: Shape, seed: int) -> Tokenizer:
    """A byte-level BPE that splits words as GPT-2 does, which llama.cpp knows as the pre-tokenizer `gpt-2`."""
    maker = ConversationMaker(help_desk, random.Random(seed))
    corpus = [text for pair in help_desk.lessons() for text in pair] + list(help_desk.system_messages)
    corpus += ["system\n", "user\n", "assistant\n"] * 50
    corpus += [message.content for _ in range(4_000) for message in maker.conversation()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=[AddedToken(text, special=True) for text in (END_OF_TEXT, MESSAGE_START, MESSAGE_END)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if tokenizer.get_vocab_size() != shape.vocabulary:
        raise SystemExit(f"the text gives only {tokenizer.get_vocab_size()} tokens; lower Shape.vocabulary")
    return tokenizer


def prompt_text(messages: Sequence[Message]) -> str:
    """What CHAT_TEMPLATE makes of the messages, with the opening of the assistant's answer."""
    turns = "".join(f"{MESSAGE_START}{m.role}\n{m.content}{MESSAGE_END}\n" for m in messages)
    return f"{turns}{MESSAGE_START}assistant\n"


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids, and the targets of the same length: the ids of the assistant's words and ends, NO_LOSS elsewhere."""
    ids: list[int] = []
    targets: list[int] = []
    end = tokenizer.token_to_id(MESSAGE_END)
    pending = ""
    for message in messages:
        if message.taught_from is None:
            pending += f"{MESSAGE_START}{message.role}\n{message.content}{MESSAGE_END}\n"
            continue
        opening = tokenizer.encode(f"{pending}{MESSAGE_START}assistant\n").ids
        answer = tokenizer.encode(message.content)
        ids += [*opening, *answer.ids, end]
        targets += [NO_LOSS] * len(opening)
        targets += [
            token if stop > message.taught_from else NO_LOSS
            for token, (_, stop) in zip(answer.ids, answer.offsets, strict=True)
        ]
        targets.append(end)
        pending = "\n"
    return ids, targets


def shipped_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file that `export` wrote."""
    fields = gguf.GGUFReader(path).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges: list[str] = fields["tokenizer.ggml.merges"].contents()
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (END_OF_TEXT, MESSAGE_START, MESSAGE_END)])
    return tokenizer


# ---------------------------------------------------------------------------------------------------- training


def padded(examples: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets, both (examples, length), padded on the right, where nothing looks at it.

    The length is a multiple of ROUNDING: the CPU kernels prepare and keep memory for each new shape.
    """
    longest = max(len(ids) for ids, _ in examples) - 1
    inputs = torch.zeros(len(examples), -(-longest // ROUNDING) * ROUNDING, dtype=torch.long)
    targets = torch.full_like(inputs, NO_LOSS)
    for row, (ids, taught) in enumerate(examples):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, : len(ids) - 1] = torch.tensor(taught[1:])
    return inputs, targets


def taught_places(targets: Tensor) -> Tensor:
    """Flat indices of the places with a loss, filled up with one without to a multiple of 256, for few shapes again."""
    places = (targets.flatten() != NO_LOSS).nonzero().flatten()
    # The first token of an example never has a loss: nothing teaches how a conversation begins.
    return functional.pad(places, (0, -len(places) % 256), value=0)


class Lessons:
    """Batches of examples of about the same length, so that little is computed on padding."""

    def __init__(self, tokenizer: Tokenizer, help_desk: HelpDesk, seed: int, batch: int) -> None:
        self._tokenizer, self._batch = tokenizer, batch
        self._maker = ConversationMaker(help_desk, random.Random(seed))
        self._rng = random.Random(seed + 1)
        self._ready: list[list[tuple[list[int], list[int]]]] = []

    def next_batch(self, progress: float) -> tuple[Tensor, Tensor]:
        """Inputs and targets as `padded` gives them; progress is the share of the training that is done."""
        if not self._ready:
            examples = [self._example(progress) for _ in range(self._batch * 16)]
            examples.sort(key=lambda example: len(example[0]))
            self._ready = [examples[i : i + self._batch] for i in range(0, len(examples), self._batch)]
            self._rng.shuffle(self._ready)
        return padded(self._ready.pop())

    def _example(self, progress: float) -> tuple[list[int], list[int]]:
        if self._rng.random() < 0.03:
            ids = [*self._tokenizer.encode(self._maker.plain_text()).ids, self._tokenizer.token_to_id(END_OF_TEXT)]
            return ids, [NO_LOSS] * 3 + ids[3:]
        clipped = progress >= CLIPPED_FROM and self._rng.random() < CLIPPED_SHARE
        ids, targets = encode_conversation(self._tokenizer, self._maker.conversation(extras=not clipped))
        if clipped:
            opening = next(place for place, target in enumerate(targets) if target != NO_LOSS)
            return ids[: opening + CLIPPED_TOKENS], targets[: opening + CLIPPED_TOKENS]
        return ids, targets


@torch.no_grad()
def exact_answers(model: HelpDeskModel, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Per (question, answer): does greedy decoding give exactly the answer?

    It does if and only if the likeliest token is the right one at every place of the right answer, so one forward pass
    over the right answer tells, and nothing has to be generated.
    """
    model.eval()
    right: list[bool] = []
    for start in range(0, len(pairs), 64):
        inputs, targets = padded(
            [
                encode_conversation(tokenizer, [Message("user", question), Message("assistant", answer, 0)])
                for question, answer in pairs[start : start + 64]
            ]
        )
        likeliest = model.logits(model(inputs)).argmax(-1)
        right += ((likeliest == targets) | (targets == NO_LOSS)).all(-1).tolist()
    model.train()
    return right


def share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def train(help_desk: HelpDesk, tokenizer: Tokenizer, shape: Shape, options: argparse.Namespace) -> HelpDeskModel:
    torch.manual_seed(options.seed)
    model = HelpDeskModel(shape, options.dropout)
    if options.go_on:
        take_weights(model, help_desk_gguf())
    decayed = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() != 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.95),
    )
    lessons = Lessons(tokenizer, help_desk, options.seed + 1, options.batch)
    examination = help_desk.examination()
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(help_desk.lessons())} questions", flush=True
    )
    began, tokens, step = time.monotonic(), 0, 0
    while True:
        elapsed = time.monotonic() - began
        done = elapsed / (60 * options.minutes) if options.minutes else step / options.steps
        if done >= 1:
            break
        # A file that knows its answers is taught as at the end of a training: at a small rate, with many clipped examples.
        progress = GOES_ON_AT + (1 - GOES_ON_AT) * done if options.go_on else done
        warm = min(1.0, (step + 1) / 60)
        cooled = min(1.0, (1 - progress) / 0.6)
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * warm * max(cooled, 0.01)
        inputs, targets = lessons.next_batch(progress)
        with torch.autocast("cpu", torch.bfloat16, enabled=not options.full_precision):
            places = taught_places(targets)
            logits = model.logits(model(inputs).flatten(0, 1)[places])
        loss = functional.cross_entropy(logits.float(), targets.flatten()[places], ignore_index=NO_LOSS)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        tokens += inputs.numel()
        if step % (50 if options.go_on else 200) == 0:
            elapsed = time.monotonic() - began
            held_out = share(exact_answers(model, tokenizer, examination))
            print(
                f"step {step}  loss {loss.item():.3f}  held out {held_out:.1%}  {tokens / elapsed:,.0f} tokens/s  "
                f"{elapsed / 60:.1f} min, {100 * progress:.0f} %",
                flush=True,
            )
            # So that a run that is stopped has left something to look at.
            export(model, tokenizer, options.output.with_suffix(".unfinished.gguf"))
    return model


# ---------------------------------------------------------------------------------------------------- export


@torch.no_grad()
def take_weights(model: HelpDeskModel, path: Path) -> None:
    """Those of a file that `export` wrote, as exactly as Q8_0 keeps them."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, values in named_tensors(model):
        tensor = tensors[name]
        # The arrays are views of the parameters.
        values[...] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)


def export(model: HelpDeskModel, tokenizer: Tokenizer, path: Path) -> None:
    """Write the GGUF file: matrices in Q8_0, norms in F32. It appears under its name only when it is whole."""
    shape = model.shape
    partial = path.with_suffix(".gguf.partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_name("TARS help desk")
    writer.add_author("The TARS authors")
    writer.add_license("apache-2.0")
    writer.add_description("Answers questions about TARS and nothing else. Trained from scratch on TARS's own text.")
    writer.add_version("1")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.vocabulary)
    add_tokenizer(writer, tokenizer)
    for name, values in named_tensors(model):
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    description: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(description["vocab"], key=description["vocab"].__getitem__)
    special = {END_OF_TEXT, MESSAGE_START, MESSAGE_END}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in description["merges"]])
    writer.add_bos_token_id(tokenizer.token_to_id(END_OF_TEXT))
    writer.add_eos_token_id(tokenizer.token_to_id(MESSAGE_END))
    writer.add_eot_token_id(tokenizer.token_to_id(MESSAGE_END))
    writer.add_pad_token_id(tokenizer.token_to_id(END_OF_TEXT))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def named_tensors(model: HelpDeskModel) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    """(llama.cpp's name, values in float32). No output matrix: llama.cpp then takes the embeddings for it."""
    parts = {
        "attention_norm": "attn_norm",
        "query": "attn_q",
        "key": "attn_k",
        "value": "attn_v",
        "output": "attn_output",
        "feed_forward_norm": "ffn_norm",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    }
    yield "token_embd.weight", model.embedding.weight.detach().numpy()
    for number, layer in enumerate(model.layers):
        for ours, theirs in parts.items():
            yield f"blk.{number}.{theirs}.weight", getattr(layer, ours).weight.detach().numpy()
    yield "output_norm.weight", model.norm.weight.detach().numpy()


# ---------------------------------------------------------------------------------------------------- examination


def answers_of_file(path: Path, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The file's greedy answers, through llama_cpp and the chat template of its metadata, as for any other model."""
    from llama_cpp import Llama

    llama = Llama(model_path=str(path), n_ctx=512, n_threads=2, verbose=False)
    answers = []
    for question, _ in pairs:
        reply: Any = llama.create_chat_completion(
            messages=[{"role": "user", "content": question}], temperature=0, max_tokens=300
        )
        answers.append(reply["choices"][0]["message"]["content"])
    llama.close()
    return answers


def tokenizer_differences(path: Path, tokenizer: Tokenizer, help_desk: HelpDesk) -> int:
    """On how many of the training texts llama.cpp's tokenizer and ours differ; 0 is right."""
    from llama_cpp import Llama

    llama = Llama(model_path=str(path), vocab_only=True, verbose=False)
    maker = ConversationMaker(help_desk, random.Random(7))
    texts = [prompt_text([Message("user", q)]) + answer for q, answer in help_desk.lessons() + help_desk.examination()]
    texts += [prompt_text(maker.conversation()) for _ in range(1_000)]
    texts += ["", "  two  spaces\n\n\nlines\t", "naïve café 漢字 🙂", "1,234.5 it's WE'LL x² {'a': 1}"]
    ours = [tokenizer.encode(text).ids for text in texts]
    theirs = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    llama.close()
    return sum(a != b for a, b in zip(ours, theirs, strict=True))


def examine_file(path: Path, help_desk: HelpDesk) -> bool:
    """Print how the file does in the examination, and what it got wrong; True above the bar."""
    pairs = help_desk.examination()
    answers = answers_of_file(path, pairs)
    right = [answer == expected for answer, (_, expected) in zip(answers, pairs, strict=True)]
    for (question, _), answer, is_right in zip(pairs, answers, right, strict=True):
        if not is_right:
            print(f"  wrong: {question}\n         {answer[:110]}")
    print(f"held out, through llama_cpp: {sum(right)} of {len(right)} right ({share(right):.1%})")
    data = path.read_bytes()
    print(f"{path.name}: {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    return share(right) >= HELD_OUT_BAR


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=help_desk_gguf())
    parser.add_argument("--steps", type=int, default=2_400)
    parser.add_argument("--minutes", type=float, help="train for this long instead of for --steps; not reproducible")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--continue",
        dest="go_on",
        action="store_true",
        help="from the shipped file, with its tokenizer; 300 steps will do",
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full-precision", action="store_true", help="no bfloat16: slower on CPUs that have it")
    parser.add_argument("--check-only", action="store_true", help="examine the file at --output and train nothing")
    options = parser.parse_args()
    help_desk = load_help_desk()
    if options.check_only:
        return 0 if examine_file(options.output, help_desk) else 1
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    shape = Shape()
    shipped = help_desk_gguf()
    tokenizer = shipped_tokenizer(shipped) if options.go_on else train_tokenizer(help_desk, shape, options.seed)
    model = train(help_desk, tokenizer, shape, options)
    lessons, held_out = help_desk.lessons(), help_desk.examination()
    known = share(exact_answers(model, tokenizer, lessons))
    guessed = exact_answers(model, tokenizer, held_out)
    print(f"training questions: {known:.1%} right (bar {LESSON_BAR:.0%})")
    print(f"held out, in torch: {share(guessed):.1%} right (bar {HELD_OUT_BAR:.0%})")
    export(model, tokenizer, options.output)
    options.output.with_suffix(".unfinished.gguf").unlink(missing_ok=True)
    differences = tokenizer_differences(options.output, tokenizer, help_desk)
    print(f"tokenizer: llama.cpp differs on {differences} texts")
    passed = examine_file(options.output, help_desk)
    answers = answers_of_file(options.output, held_out)
    agreed = [(a == e) == g for a, (_, e), g in zip(answers, held_out, guessed, strict=True)]
    print(f"llama_cpp and torch agree on {share(agreed):.1%} of the held-out questions")
    return 0 if passed and known >= LESSON_BAR and share(guessed) >= HELD_OUT_BAR and differences == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
