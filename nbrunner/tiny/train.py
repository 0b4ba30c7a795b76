"""Train the bundled model: ``python -m nbrunner.tiny.train --out DIR --steps N`` (its three runs: README.md).

Writes a complete checkpoint (config, generation config, bf16 weights, tokenizer with its chat template) and prints
how much of `corpus.held_out` it answers. Seeded: the text is the same to the letter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nbrunner.tiny import corpus

VOCABULARY = 2048
CONTEXT = 1024
# (rows, tokens per row, share of steps): about equally many tokens each. Most text is short; the long rows keep
# attention from collapsing where no position was ever trained.
SHAPES = ((16, 128, 0.82), (8, 256, 0.12), (2, 1024, 0.06))


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the generated text: any text round-trips, and common words are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(corpus.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = itertools.islice(corpus.documents(seed), 40_000)
    marks = corpus.SPECIAL_TOKENS
    pieces = (piece for text in texts for piece in _split(text, marks))
    tokenizer.train_from_iterator(pieces, trainer)
    bos = tokenizer.token_to_id(corpus.BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{corpus.BOS} $A", pair=f"{corpus.BOS} $A $B", special_tokens=[(corpus.BOS, bos)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=corpus.BOS,
        eos_token=corpus.EOS,
        pad_token=corpus.PAD,
        additional_special_tokens=[corpus.USER, corpus.ASSISTANT, corpus.SYSTEM],
        chat_template=corpus.CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _split(text: str, marks: tuple[str, ...]) -> list[str]:
    for mark in marks:
        text = text.replace(mark, "\0")
    return [piece for piece in text.split("\0") if piece]


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def attention_in_fp32(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments, **options
):
    """Attention out of autocast's reach: on a CPU its bf16 backward takes eight times as long as the fp32 one."""
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), *arguments, **options)


class Packer:
    """Rows of packed documents; a row may begin anywhere in a document, as the windows of a stream do."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, mix: corpus.Mix) -> None:
        self.tokenizer = tokenizer
        self.source = corpus.documents(seed, mix)
        self.tokens: list[int] = []

    def rows(self, rows: int, length: int) -> torch.Tensor:
        """int64 [rows, length]."""
        while len(self.tokens) < rows * length:
            texts = list(itertools.islice(self.source, 256))
            for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]:
                self.tokens += ids
        taken, self.tokens = self.tokens[: rows * length], self.tokens[rows * length :]
        return torch.tensor(taken).view(rows, length)


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    seed: int,
    mix: corpus.Mix,
    peak: float,
) -> None:
    rng = random.Random(seed)
    packer = Packer(tokenizer, seed + 1, mix)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.98),
    )
    AttentionInterface.register("fp32", attention_in_fp32)
    AttentionMaskInterface.register("fp32", sdpa_mask)
    model.set_attn_implementation("fp32")
    shapes, shares = [shape[:2] for shape in SHAPES], [shape[2] for shape in SHAPES]
    started, mean_loss = time.monotonic(), 0.0
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        (shape,) = rng.choices(shapes, shares)
        batch = packer.rows(*shape)
        # The weights stay fp32; only products of matrices are bf16, which nearly halves the time of a step.
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean_loss = loss.item() if step == 0 else 0.98 * mean_loss + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            held = ""
            if (step + 1) % 500 == 0:
                held = f"  held-out {held_out_score(model, tokenizer):.1%}"
                model.train()
            print(f"{step + 1:5d}  loss {mean_loss:.3f}{held}  {time.monotonic() - started:.0f} s", flush=True)
    model.set_attn_implementation("sdpa")


@torch.no_grad()
def held_out_score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, context: str = "") -> float:
    """Share of `corpus.held_out` answered in full by greedy generation; `context` is put before every prompt."""
    model.eval()
    # Every seventh is enough, and far cheaper, behind a long context.
    facts = corpus.held_out()[:: 7 if context else 1]
    batch = tokenizer([context + fact.prompt for fact in facts], return_tensors="pt", padding=True)
    said = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    wrong = [
        (fact.prompt, fact.answer, text)
        for fact, text in zip(facts, texts, strict=True)
        if not fact.answered_by(text)
    ]
    if len(wrong) <= 12 and not context:
        for item in wrong:
            print("   wrong:", item)
    return 1 - len(wrong) / len(facts)


def long_context(tokenizer: PreTrainedTokenizerFast, tokens: int) -> str:
    """About `tokens` tokens of other documents, as text, ending with eos and a new bos-less start."""
    texts, count = [], 0
    for text in corpus.documents(987):
        count += len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if count > tokens:
            return "".join(texts).removeprefix(corpus.BOS)
        texts.append(text)
    return ""


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint in bf16, leaving the model itself as it is."""
    out.mkdir(parents=True, exist_ok=True)
    rounded = LlamaForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    rounded.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    rounded.save_pretrained(out)
    tokenizer.backend_tokenizer.no_padding()  # what the last call asked for would be saved as everybody's default
    tokenizer.save_pretrained(out)
    # One file fewer, and the same to every version of transformers: the template belongs to the tokenizer.
    (out / "chat_template.jinja").unlink(missing_ok=True)
    config_file = out / "tokenizer_config.json"
    settings = json.loads(config_file.read_text())
    settings["chat_template"] = corpus.CHAT_TEMPLATE
    for where_it_was_loaded_from in ("is_local", "local_files_only"):
        settings.pop(where_it_was_loaded_from, None)
    config_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start", type=Path, help="checkpoint to go on from; a new model and tokenizer if not given"
    )
    parser.add_argument("--mix", choices=("facts", "long"), default="facts", help="shares of the kinds of text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    if arguments.start is None:
        tokenizer = build_tokenizer(arguments.seed)
        model = LlamaForCausalLM(build_config(tokenizer))
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.start)
        model = AutoModelForCausalLM.from_pretrained(arguments.start, dtype=torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    train(
        model,
        tokenizer,
        steps=arguments.steps,
        seed=arguments.seed,
        mix=arguments.mix,
        peak=arguments.learning_rate,
    )
    save(model, tokenizer, arguments.out)
    # What counts is what was written: bf16-rounded, through the loaders that everybody uses.
    model = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.out)
    print(f"held-out, as saved: {held_out_score(model, tokenizer):.1%}")
    for tokens in (128, 256, 512, 960):
        score = held_out_score(model, tokenizer, long_context(tokenizer, tokens))
        print(f"  after {tokens} tokens of other text: {score:.1%}")


if __name__ == "__main__":
    main()
