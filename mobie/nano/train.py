"""Train the embedded nano-OLMoE on a CPU (or a GPU), resumable, with a progress bar.

Notable: hidden matrices are updated with Muon (momentum whose update is orthogonalised by a Newton–Schulz iteration;
Jordan et al. 2024), which on this corpus reaches a given loss in far fewer tokens than AdamW; embeddings, head, router
and norms use AdamW. Learning rates follow warm-up, plateau, linear decay to zero, so a run can be prolonged while
it is on its plateau.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from mobie.nano.corpus import Corpus

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights (with the corpus): shape, optimiser, schedule, seed."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 16
    top_k: int = 4
    sequence_length: int = 256
    batch_sequences: int = 32
    steps: int = 1700
    warmup_steps: int = 100
    decay_fraction: float = 0.4
    muon_lr: float = 0.02
    adam_lr: float = 0.004
    weight_decay: float = 0.05
    router_aux_loss: float = 0.01
    seed: int = 0

    def model_config(self, end_of_text: int) -> OlmoeConfig:
        return OlmoeConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            max_position_embeddings=self.sequence_length,
            router_aux_loss_coef=self.router_aux_loss,
            tie_word_embeddings=False,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
        )

    def lr_scale(self, step: int) -> float:
        """Warm-up, plateau, linear decay to zero over the last `decay_fraction` of the steps."""
        decay_steps = int(self.steps * self.decay_fraction)
        return min(1.0, (step + 1) / self.warmup_steps, max(0.0, (self.steps - step) / decay_steps))


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

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
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
    """Muon for attention and experts, AdamW for embeddings, head, router and norms."""
    fused, matrices, rest = [], [], []
    for name, p in model.named_parameters():
        if "gate_up_proj" in name:
            fused.append(p)
        elif "down_proj" in name or "self_attn" in name and p.ndim == 2:
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
    """Token ids `(batch_sequences, sequence_length + 1)` of a step: shuffled windows, a new order and offset each epoch."""
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
def heldout_perplexity(model: OlmoeForCausalLM, stream: np.ndarray, length: int, max_windows: int | None) -> float:
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


def _save_checkpoint(path: Path, **state) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(corpus: Corpus, work: Path, recipe: Recipe, *, checkpoint_every: int = 100) -> dict[str, float]:
    """Train or go on from the checkpoint in `work`; leaves `work/model` (weights in bfloat16, tokenizer).

    Returns the figures for the training record: tokens seen, seconds, held-out perplexity of the stored weights.
    """
    work.mkdir(parents=True, exist_ok=True)
    tokenizer_folder = work / "tokenizer"
    if not tokenizer_folder.exists():
        train_tokenizer(corpus.train, recipe.vocab_size).save_pretrained(tokenizer_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    stream = pack(corpus.train, tokenizer, recipe.seed)
    heldout = pack(corpus.heldout, tokenizer, recipe.seed)

    torch.manual_seed(recipe.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = OlmoeForCausalLM._from_config(
        recipe.model_config(tokenizer.eos_token_id), experts_implementation="grouped_mm"
    ).to(device)
    optimizers = make_optimizers(model, recipe)
    checkpoint = work / "checkpoint.pt"
    start, seconds_before = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, seconds_before = state["step"], state["seconds"]

    tokens_per_step = recipe.batch_sequences * recipe.sequence_length
    began = time.monotonic()
    log = work / "log.csv"
    with log.open("a", newline="") as log_file, tqdm(
        total=recipe.steps, initial=start, unit="step", smoothing=0.02
    ) as bar:
        writer = csv.writer(log_file)
        for step in range(start, recipe.steps):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * recipe.lr_scale(step)
            tokens = batch(stream, recipe, step).to(device)
            output = model(tokens[:, :-1], output_router_logits=True)
            loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
            (loss + recipe.router_aux_loss * output.aux_loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            done = step + 1
            bar.update()
            bar.set_postfix_str(f"loss {loss.item():.3f}, {tokens_per_step * (done - start) / (time.monotonic() - began):.0f} tok/s")
            if done % checkpoint_every == 0 or done == recipe.steps:
                seconds = seconds_before + time.monotonic() - began
                perplexity = heldout_perplexity(model, heldout, recipe.sequence_length, 64)
                writer.writerow([done, done * tokens_per_step, f"{loss.item():.4f}", f"{perplexity:.3f}", f"{seconds:.0f}"])
                log_file.flush()
                _save_checkpoint(
                    checkpoint,
                    model=model.state_dict(),
                    optimizers=[o.state_dict() for o in optimizers],
                    step=done,
                    seconds=seconds,
                )

    stored = model.to(torch.bfloat16)
    stored.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    evaluated = OlmoeForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    figures = {
        "heldout_perplexity": heldout_perplexity(evaluated, heldout, recipe.sequence_length, None),
        "heldout_tokens": len(heldout),
        "train_tokens_unique": len(stream),
        "train_tokens_seen": recipe.steps * tokens_per_step,
        "seconds": seconds_before + time.monotonic() - began,
    }
    (work / "figures.json").write_text(json.dumps(figures | asdict(recipe), indent=2, sort_keys=True) + "\n")
    return figures
