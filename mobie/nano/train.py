"""Train an embedded nano model on a CPU (or a GPU), resumable, with a progress bar.

Notable: hidden matrices are updated with Muon (momentum whose update is orthogonalised by a Newton–Schulz iteration;
Jordan et al. 2024), which on this corpus reaches a given loss in far fewer tokens than AdamW; embeddings, head, router
and norms use AdamW. Learning rates follow warm-up, plateau, linear decay to zero, so a run can be prolonged while
it is on its plateau.
"""

from __future__ import annotations

import csv
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
)

from mobie.nano.corpus import Corpus
from mobie.nano.state import read_state, save_state
from mobie.provenance import versions
from mobie.storage import write_json

END_OF_TEXT = "<|endoftext|>"
LOG = "log.csv"
LOG_COLUMNS = ("step", "tokens", "loss", "heldout_perplexity", "seconds")
VALIDATION_WINDOWS = 64


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights (with the corpus): architecture, shape, optimiser, schedule, seed.

    architecture:             as transformers names it (`model_type`).
    intermediate_size:        width of a routed expert.
    shared_intermediate_size: width of the expert that every token takes (`qwen2_moe` only; 0 where there is none).
    """

    architecture: Literal["olmoe", "qwen2_moe"] = "olmoe"
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 128
    shared_intermediate_size: int = 0
    layers: int = 4
    heads: int = 4
    experts: int = 16
    top_k: int = 4
    sequence_length: int = 256
    batch_sequences: int = 32
    steps: int = 1200
    warmup_steps: int = 100
    decay_fraction: float = 0.5
    muon_lr: float = 0.02
    adam_lr: float = 0.004
    weight_decay: float = 0.05
    router_aux_loss: float = 0.01
    seed: int = 0

    def model_config(self, end_of_text: int) -> PreTrainedConfig:
        common = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "max_position_embeddings": self.sequence_length,
            "router_aux_loss_coef": self.router_aux_loss,
            "tie_word_embeddings": False,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
            "pad_token_id": end_of_text,
        }
        if self.architecture == "olmoe":
            return OlmoeConfig(intermediate_size=self.intermediate_size, **common)
        return Qwen2MoeConfig(
            intermediate_size=self.shared_intermediate_size,  # of a dense block, and there is none
            moe_intermediate_size=self.intermediate_size,
            shared_expert_intermediate_size=self.shared_intermediate_size,
            norm_topk_prob=False,
            **common,
        )

    def lr_scale(self, step: int) -> float:
        """Warm-up, plateau, linear decay to zero over the last `decay_fraction` of the steps."""
        decay_steps = int(self.steps * self.decay_fraction)
        return min(1.0, (step + 1) / self.warmup_steps, max(0.0, (self.steps - step) / decay_steps))


#: the recipe of each embedded model
RECIPES: dict[str, Recipe] = {
    "nano-olmoe": Recipe(),
    "nano-qwen2-moe": Recipe(
        architecture="qwen2_moe",
        intermediate_size=96,
        shared_intermediate_size=192,
        layers=3,
        experts=24,
        batch_sequences=16,
        steps=1600,
    ),
}


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one special token, trained on the training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def pack(documents: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> np.ndarray:
    """Shuffle the documents and join them, each opened by the end-of-text token: one uint16 stream."""
    order = np.random.default_rng([seed, 1]).permutation(len(documents))
    encoded = tokenizer([documents[i] for i in order], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return np.concatenate([np.array([end, *ids], dtype=np.uint16) for ids in encoded])


def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix of each matrix in `(..., rows, cols)`, by a quintic Newton–Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    transposed = update.shape[-2] > update.shape[-1]
    x = update.mT if transposed else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices, single `(rows, cols)` or stacked `(experts, rows, cols)`.

    `torch.optim.Muon` takes two-dimensional parameters only, and the experts are one three-dimensional parameter.
    A fused gate-and-up stack is orthogonalised half by half.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                halves = [orthogonalize(part) for part in update.chunk(group["parts"], dim=-2)]
                rows, cols = halves[0].shape[-2:]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.cat(halves, dim=-2), alpha=-group["lr"] * math.sqrt(max(1, rows / cols)))


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for attention and experts, AdamW for embeddings, head, router, a shared expert's gate, biases and norms."""
    fused, matrices, rest = [], [], []
    for name, p in model.named_parameters():
        if "gate_up_proj" in name:
            fused.append(p)
        elif "down_proj" in name or "shared_expert." in name or "self_attn" in name and p.ndim == 2:
            matrices.append(p)
        else:
            rest.append(p)
    groups = [{"params": fused, "parts": 2}, {"params": matrices, "parts": 1}]
    muon = Muon(groups, lr=recipe.muon_lr, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [muon, adam]


def batch(stream: np.ndarray, recipe: Recipe, step: int) -> Tensor:
    """Token ids `(batch_sequences, sequence_length + 1)` of a step; each epoch has a new order and offset."""
    length = recipe.sequence_length
    windows = (len(stream) - 1) // length - 1
    per_epoch = windows // recipe.batch_sequences
    epoch, index = divmod(step, per_epoch)
    rng = np.random.default_rng([recipe.seed, 2, epoch])
    offset = int(rng.integers(length))
    chosen = rng.permutation(windows)[index * recipe.batch_sequences :][: recipe.batch_sequences]
    rows = [stream[offset + w * length : offset + w * length + length + 1] for w in chosen]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def heldout_perplexity(model: PreTrainedModel, stream: np.ndarray, length: int, max_windows: int | None) -> float:
    """Perplexity over consecutive windows of `length` tokens; every token but a window's first is predicted."""
    count = (len(stream) - 1) // length
    count = min(count, max_windows) if max_windows else count
    windows = torch.from_numpy(stream[: count * length].astype(np.int64)).view(count, length)
    device = next(model.parameters()).device
    total = 0.0
    for part in windows.split(32):
        logits = model(part.to(device)).logits[:, :-1]
        total += nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), part[:, 1:].flatten().to(device), reduction="sum"
        ).item()
    return math.exp(total / (count * (length - 1)))


class Run:
    """A training run in a folder: model, optimisers, and how far it has come."""

    def __init__(self, work: Path, recipe: Recipe, end_of_text: int) -> None:
        """Start a run, or go on from the checkpoint in `work`."""
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = recipe.model_config(end_of_text)
        model = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm")
        self.model = model.to(self.device)
        self.optimizers = make_optimizers(self.model, recipe)
        self.step, self._seconds_before = 0, 0.0
        self._checkpoint = work / "checkpoint.safetensors"
        if self._checkpoint.exists():
            self.step, self._seconds_before = read_state(self._checkpoint, self.model, self.optimizers)
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def train_step(self, tokens: Tensor) -> float:
        """One update on token ids `(sequences, length + 1)`; returns the cross-entropy."""
        recipe = self.recipe
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * recipe.lr_scale(self.step)
        tokens = tokens.to(self.device)
        output = self.model(tokens[:, :-1], output_router_logits=True)
        loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
        (loss + recipe.router_aux_loss * output.aux_loss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        save_state(self._checkpoint, self.model, self.optimizers, self.step, self.seconds)


def train(corpus: Corpus, work: Path, recipe: Recipe, *, checkpoint_every: int = 50) -> dict[str, Any]:
    """Train, or go on from the checkpoint in `work`; leaves `work/model` and `work/training.json`.

    Returns the training record.
    """
    work.mkdir(parents=True, exist_ok=True)
    tokenizer_folder = work / "tokenizer"
    if not tokenizer_folder.exists():
        train_tokenizer(corpus.train, recipe.vocab_size).save_pretrained(tokenizer_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    stream = pack(corpus.train, tokenizer, recipe.seed)
    heldout = pack(corpus.heldout, tokenizer, recipe.seed)
    run = Run(work, recipe, tokenizer.eos_token_id)
    tokens_per_step = recipe.batch_sequences * recipe.sequence_length
    with (
        (work / LOG).open("a", newline="") as log_file,
        tqdm(total=recipe.steps, initial=run.step, unit="step", smoothing=0.02) as bar,
    ):
        log = csv.writer(log_file)
        while run.step < recipe.steps:
            loss = run.train_step(batch(stream, recipe, run.step))
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}")
            if run.step % checkpoint_every == 0 or run.step == recipe.steps:
                perplexity = heldout_perplexity(run.model, heldout, recipe.sequence_length, VALIDATION_WINDOWS)
                seen = run.step * tokens_per_step
                log.writerow([run.step, seen, f"{loss:.4f}", f"{perplexity:.3f}", f"{run.seconds:.0f}"])
                log_file.flush()
                run.save()
    run.model.to(torch.bfloat16).save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    return write_record(corpus, work, recipe)


def write_record(corpus: Corpus, work: Path, recipe: Recipe) -> dict[str, Any]:
    """Write `work/training.json`: how the stored weights in `work/model` were made and how good they are."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    heldout = pack(corpus.heldout, tokenizer, recipe.seed)
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32, use_safetensors=True).eval()
    with (work / LOG).open(newline="") as file:
        curve = [dict(zip(LOG_COLUMNS, map(float, row), strict=True)) for row in csv.reader(file)]
    record = {
        "answer_overlap": corpus.answer_overlap,
        "curve": curve,
        "documents": {"train": len(corpus.train), "heldout": len(corpus.heldout)},
        "dropped": corpus.dropped,
        "heldout_perplexity": heldout_perplexity(model, heldout, recipe.sequence_length, None),
        "heldout_tokens": len(heldout),
        "recipe": asdict(recipe),
        "seconds": curve[-1]["seconds"],
        "train_tokens_seen": recipe.steps * recipe.batch_sequences * recipe.sequence_length,
        "train_tokens_unique": len(pack(corpus.train, tokenizer, recipe.seed)),
        "versions": versions(),
    }
    write_json(work / "training.json", record)
    return record
