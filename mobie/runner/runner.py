"""Prefill and decode with the library's own model, a static cache and one step that can be captured in a CUDA graph.

A decode step chooses a token of every row from the logits that lie ready, writes it down and runs the model on it. All
it needs lies in buffers of fixed address (logits, position, mask, tokens, draws), so a CUDA graph can replay it without
any host code; on a CPU, or where a model cannot be captured, the same function is called. Prefill is never captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mobie.errors import DataError, UnsupportedError
from mobie.kernels.backend import say_once
from mobie.runner.cache import CursorCache
from mobie.runner.clock import Times, make_clock, peak_memory_bytes, start_peak_memory
from mobie.runner.graph import Capture, Step, capture_cuda, capture_obstacle
from mobie.runner.inputs import Prompts, check_current_device, check_model, end_tokens, model_device, prompt_rows
from mobie.runner.sampling import GREEDY, Sampling, choose_greedy, choose_sampled
from mobie.runner.state import RunState

#: decode steps between two looks from the host (end of all rows, progress); each look waits for the device
STEPS_PER_LOOK = 8


class DecodeRunner:
    """Generates for a fixed number of rows in a cache of fixed length.

    model:   any causal language model of the library with attention layers: 16-bit experts (the library's own
             implementations or "mobie-dense") or packed ones. Attach kernels first: a captured step keeps what it saw.
    batch:   rows; every prefill brings as many prompts.
    context: tokens of a row, prompt and new ones together.
    graphs:  capture the step in a CUDA graph; True insists, None does so where it is possible and says where it is not.
    eos:     tokens that end a row, which then emits `pad`; None takes the model's generation settings, () none.
    compile: run the step's model through `torch.compile`; falls back, and says so, where that fails.
    capture: how a step is captured (for tests).
    Raises UnsupportedError for a model, a context or a device that the runner cannot serve.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch: int,
        context: int,
        graphs: bool | None = None,
        eos: Sequence[int] | None = None,
        pad: int | None = None,
        compile: bool = False,
        capture: Capture = capture_cuda,
    ) -> None:
        if batch < 1 or context < 1:
            raise UnsupportedError(f"batch {batch} and context {context}, expected at least 1 each")
        self.model, self.batch, self.context = model, batch, context
        self.config = model.config.get_text_config(decoder=True)
        # where a configuration asks for them, the library computes a training loss from them in every pass
        has_router_logits = hasattr(self.config, "output_router_logits")
        self._no_router_logits = {"output_router_logits": False} if has_router_logits else {}
        self.device = model_device(model)
        check_current_device(self.device)
        check_model(model, self.config, context)
        start_peak_memory(self.device)
        self.graphs = self._may_capture(graphs, capture)
        self._must_capture = bool(graphs)
        self._capture = capture
        self._replays: dict[Callable[[], Tensor], Step] = {}
        self._decode_logits = torch.compile(self._logits, dynamic=False) if compile else self._logits
        self._must_try_compiled = compile
        self._cache = CursorCache(self.config.num_hidden_layers, context, self.device)
        eos, pad = end_tokens(getattr(model, "generation_config", None), eos, pad)
        self._state = RunState(
            position=self._cache.cursor.position,
            rows=batch,
            context=context,
            slots=self._cache.slots,
            vocabulary=self.config.vocab_size,
            eos=eos,
            pad=pad,
            dtype=model.dtype,
        )
        self._forget_times()
        self.length = 0  # tokens in the cache, as the host counts them; `position` is the same on the device

    def _may_capture(self, graphs: bool | None, capture: Capture) -> bool:
        if graphs is False:
            return False
        if self.device.type != "cuda" and capture is capture_cuda:
            if graphs:
                raise UnsupportedError(
                    f"CUDA graphs were asked for, but the model is on {self.device}; move it with model.to('cuda'), "
                    "or use graphs=None"
                )
            return False
        obstacle = capture_obstacle(self.config, self.device, self.model.dtype)
        if obstacle and graphs:
            raise UnsupportedError(f"the decode step cannot be captured in a CUDA graph: {obstacle}")
        if obstacle:
            say_once(f"decoding without a CUDA graph: {obstacle}")
        return obstacle is None

    # -- prefill

    @torch.no_grad()
    def prefill(self, prompts: Prompts, *, chunk: int | None = None) -> Tensor:
        """Run the prompts from an empty cache; returns the next token's logits `(batch, vocabulary)` float32.

        prompts: ids `(batch, length)`, or one list of ids per row; unequal lists are padded on the left and the padding
                 is masked, as the library does it.
        chunk:   tokens per forward pass; None is all at once. Smaller chunks need less memory.
        Raises DataError for wrong prompts and for one that exceeds the context.
        """
        self._check_device()
        tokens, padding = prompt_rows(prompts, batch=self.batch, vocabulary=self.config.vocab_size)
        length = tokens.shape[1]
        if length > self.context:
            raise DataError(
                f"prompt of {length} tokens exceeds the context of {self.context}; make a DecodeRunner with "
                f"context={length} or more, and room for the new tokens"
            )
        if chunk is not None and chunk < 1:
            raise DataError(f"prefill chunk of {chunk} tokens, expected 1 or more, or None for the whole prompt")
        self._forget_times()
        self.length = 0  # until the cache holds the whole prompt
        self._clock.mark()
        self._state.start(tokens, padding)
        self._run_chunks(length, chunk or length, padded=bool(padding.any()))
        self._clock.mark()
        self.length = self._prompt_length = length
        return self.logits

    def _check_device(self) -> None:
        if (device := model_device(self.model)) != self.device:
            raise UnsupportedError(
                f"the model was moved from {self.device} to {device}; make a new DecodeRunner for it"
            )

    def _run_chunks(self, length: int, chunk: int, *, padded: bool) -> None:
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            self._cache.cursor.span = (start, end)
            # without padding the library sees a plain causal first chunk and takes its fastest attention
            mask = self._state.chunk_mask(start, end) if start or padded else None
            logits = self._logits(self._state.tokens[:, start:end], self._state.chunk_positions(start, end), mask)
        self._state.logits.copy_(logits)

    def _logits(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Logits after the last of `tokens (batch, n)`, `(batch, vocabulary)`. Mask, positions and the place in the
        cache are given, so that the library derives none of them on the host."""
        output = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **self._no_router_logits,
        )
        return output.logits[:, -1]

    # -- decode

    def decode(self, steps: int, sampling: Sampling = GREEDY, *, stop: bool = False, progress: bool = False) -> Tensor:
        """The next `steps` tokens of every row, `(batch, steps)` int64; further calls go on where the last one ended.

        stop:     return when every row has ended, cut after the last row's end token.
        progress: a bar with tokens per second, on a terminal. It waits for the device now and then: not for timing.
        Raises DataError before a prefill and for more tokens than the context holds.
        """
        first = self.length
        ended = self.finished
        total = steps * self.batch
        with tqdm(total=total, desc="decode", unit="tok", disable=None if progress else True, leave=False) as bar:
            for done, _ in enumerate(self.stream(steps, sampling), start=1):
                if done % STEPS_PER_LOOK and done < steps:
                    continue
                if not bar.disable:
                    self._clocks[-1].wait()
                    bar.update(done * self.batch - bar.n)
                if stop and bool(self._state.finished.all()):
                    break
        tokens = self._state.tokens[:, first : self.length].clone()
        return tokens[:, : self._last_end(tokens, ended)] if stop else tokens

    def stream(self, steps: int, sampling: Sampling = GREEDY) -> Iterator[Tensor]:
        """`decode` token by token: yields `(batch,)` on the device, without waiting for it, up to `steps` times."""
        self._check_steps(steps)
        self._prepare(sampling)
        step = self._ready_step(sampling)
        clock = make_clock(self.device)
        clock.mark()
        self._clocks.append(clock)
        for _ in range(steps):
            step()
            clock.mark()
            self.length += 1
            yield self._state.tokens[:, self.length - 1]

    def _check_steps(self, steps: int) -> None:
        if not self.length:
            raise DataError("decode before prefill: the cache is empty; call prefill(prompts) first")
        if steps < 1:
            raise DataError(f"{steps} decode steps, expected 1 or more")
        if self.length + steps > self.context:
            raise DataError(
                f"{self.length} tokens and {steps} more exceed the context of {self.context}; decode at most "
                f"{self.context - self.length}, or make a DecodeRunner with context={self.length + steps} or more"
            )

    @torch.no_grad()
    def _prepare(self, sampling: Sampling) -> None:
        self._cache.cursor.span = None
        if not sampling.greedy:
            self._state.draw_for(sampling, self._prompt_length)

    def _choose_greedy(self) -> Tensor:
        return choose_greedy(self._state.logits)

    def _choose_from_all(self) -> Tensor:
        return choose_sampled(self._state.logits, self._state.next_draw(), self._state.temperature, None)

    def _choose_from_nucleus(self) -> Tensor:
        state = self._state
        return choose_sampled(state.logits, state.next_draw(), state.temperature, state.top_p)

    def _chooser(self, sampling: Sampling) -> Callable[[], Tensor]:
        if sampling.greedy:
            return self._choose_greedy
        return self._choose_from_all if sampling.top_p == 1 else self._choose_from_nucleus

    @torch.no_grad()
    def _step(self, choose: Callable[[], Tensor]) -> None:
        """One decode step. Only device work on buffers of fixed address: this is what a graph captures."""
        state = self._state
        token = state.write(choose())[:, None]  # (batch, 1)
        positions = state.position - state.padding[:, None]
        state.logits.copy_(self._decode_logits(token, positions, state.mask))
        state.position.add_(1)

    def _ready_step(self, sampling: Sampling) -> Step:
        """The step for this kind of sampling: replayed where graphs are used (captured at first), called elsewhere."""
        choose = self._chooser(sampling)

        def step() -> None:
            self._step(choose)

        if self._must_try_compiled:
            self._try_compiled(step)
        if not self.graphs:
            return step
        if choose not in self._replays:
            self._replays[choose] = self._captured(step)
        return self._replays[choose] if self.graphs else step

    def _captured(self, step: Step) -> Step:
        reset = self._state.save()
        try:
            return self._capture(step, reset)
        except RuntimeError as error:
            # what a model's kernels allow in a capture shows only when it is tried; decoding goes on without
            if self._must_capture:
                raise UnsupportedError(
                    f"the decode step could not be captured in a CUDA graph: {_first_line(error)}; use graphs=None"
                ) from error
            reset()
            self.graphs = False
            say_once(f"decoding without a CUDA graph: the capture failed: {_first_line(error)}")
            return step

    def _try_compiled(self, step: Step) -> None:
        self._must_try_compiled = False
        reset = self._state.save()
        try:
            step()
        except Exception as error:  # a compiler fails in many ways, and none of them should end a generation
            self._decode_logits = self._logits
            say_once(f"decoding without torch.compile, which failed: {_first_line(error)}")
        reset()

    def _last_end(self, tokens: Tensor, ended: Tensor) -> int:
        """Columns of `tokens (batch, n)` that are not all padding; the rows `ended (batch,)` had ended before."""
        ends = torch.isin(tokens, self._state.eos).int()
        before = ends.cumsum(1) - ends  # end tokens before each place
        return int(((before == 0) & ~ended[:, None]).sum(1).max())

    # -- what there is to know

    @property
    def logits(self) -> Tensor:
        """Logits of the next token, `(batch, vocabulary)` float32, a copy."""
        return self._state.logits.clone()

    @property
    def finished(self) -> Tensor:
        """Which rows have emitted an end token, `(batch,)` bool, a copy."""
        return self._state.finished.clone()

    @property
    def times(self) -> Times:
        """Times of the last prefill and of all decode steps since; waits for the device."""
        if not self.length:
            raise DataError("times before prefill: nothing was run yet")
        steps = tuple(seconds for clock in self._clocks for seconds in clock.intervals())
        return Times(self.batch, self._prompt_length, self._clock.intervals()[0], steps)

    @property
    def peak_memory_bytes(self) -> int:
        """GPU: largest memory of tensors since this runner was made (weights included). CPU: the process's peak."""
        return peak_memory_bytes(self.device)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values."""
        written = (layer for layer in self._cache.layers if layer.is_initialized)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in written)

    def _forget_times(self) -> None:
        self._clock = make_clock(self.device)
        self._clocks: list[Any] = []


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
