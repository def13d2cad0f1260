""" Generation: prompts in, tokens out, all rows of a batch at once and with a KV cache.

    tokens = generate(model, [[464, 3290]], max_new_tokens=20, sampling=Sampling(temperature=0.8, top_k=200))[0]

GPT.generate is a thin door to it. What is not here: the model (model.py), text (sample.py).
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, KVCache


@dataclass
class Sampling:
    """ how a token is drawn from logits; ValueError for what makes no distribution. The defaults change nothing. """
    temperature: float = 1.0          # 0 takes the likeliest token
    top_k: int | None = None          # the k likeliest only, None or 0: all
    top_p: float = 1.0                # the likeliest that together have this probability (arXiv 1904.09751)
    min_p: float = 0.0                # those with at least this share of the likeliest's probability (arXiv 2407.01082)
    repetition_penalty: float = 1.0   # above 1 makes tokens of the text so far less likely (arXiv 1909.05858)

    def __post_init__(self):
        for name, good, wanted in (
                ('temperature', self.temperature >= 0, "must not be negative"),
                ('top_k', (self.top_k or 0) >= 0, "must not be negative"),
                ('top_p', 0 < self.top_p <= 1, "must be above 0 and at most 1"),
                ('min_p', 0 <= self.min_p <= 1, "must be 0 to 1"),
                ('repetition_penalty', self.repetition_penalty > 0, "must be above 0")):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)} {wanted}")

    def scores(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """ logits (B, V) as float32 scores, -inf for what cannot be drawn; seen (B, V): which ids the text has

        In the order of Hugging Face's processors: repetition penalty, temperature, top_k, top_p, min_p.
        """
        scores = logits.float()
        if self.repetition_penalty != 1 and seen is not None:
            weaker = torch.where(scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty)
            scores = torch.where(seen, weaker, scores)
        if self.temperature == 0:
            return scores
        scores = scores / self.temperature
        if self.top_k:
            kth = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < kth, -math.inf)
        if self.top_p < 1:
            ordered, order = scores.sort(dim=-1)                              # the likeliest last
            small = F.softmax(ordered, dim=-1).cumsum(dim=-1) <= 1 - self.top_p
            small[:, -1] = False                                              # never nothing
            scores = scores.masked_fill(small.scatter(1, order, small), -math.inf)
        if self.min_p:
            probabilities = F.softmax(scores, dim=-1)
            least = self.min_p * probabilities.amax(dim=-1, keepdim=True)
            scores = scores.masked_fill(probabilities < least, -math.inf)
        return scores

    def draw(self, scores: Tensor, generators: list[torch.Generator]) -> Tensor:
        """ an id per row of scores (B, V), as (B, 1), where the row's own generator throws the dice

        One uniform number a row goes through the cumulated probabilities, so a row's text does not depend on the others
        and an id of probability 0 is never drawn, not even on MPS, where multinomial does that.
        """
        if self.temperature == 0:
            return scores.argmax(dim=-1, keepdim=True)
        total = F.softmax(scores, dim=-1).cpu().double().cumsum(dim=-1)       # (B, V)
        dice = torch.cat([torch.rand(1, 1, generator=each, dtype=torch.float64) for each in generators])
        ids = torch.searchsorted(total, dice * total[:, -1:], right=True)     # the first whose sum is above the dice
        return ids.to(scores.device)


def _pad(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ ids (B, S), shorter prompts padded on the left, and the length of the padding (B,) """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    return ids, padding


class _Context:
    """ the text so far, ids (B, S), the place where each row's window begins, and what the model has computed of it """

    def __init__(self, model: GPT, prompts: list[list[int]], max_new_tokens: int, exact: bool):
        self.model, self.exact, self.limit = model, exact, model.config.block_size
        self.ids, self.padding = _pad(prompts, model.lm_head.weight.device)
        self.begin = self.padding.clamp(min=self.ids.shape[1] - self.limit)   # (B,)
        self.last = self.ids.shape[1] + max_new_tokens
        self.cache = None

    def logits(self) -> Tensor:
        """ (B, V) for the next token

        A full window cannot slide: positions are counted from its start, so every key would change. By default a row
        goes on with the recent half of its window, computed anew once in half a block_size of tokens. With exact,
        past block_size it sees the last block_size tokens, as in nanoGPT, at the price of a forward over all of
        them for each. Either way the windows, and so the text of a row, do not depend on the other rows.
        """
        full = self.ids.shape[1] - self.begin > self.limit
        if self.cache and not full.any():
            return self.model(self.ids[:, -1:].contiguous(), cache=self.cache)[0][:, -1]
        kept = self.limit if self.exact else max(self.limit // 2, 1)
        self.begin = self.begin.where(~full, self.ids.shape[1] - kept)
        start = self.begin.min().item()
        self.cache = self._empty_cache(self.begin - start, min(self.limit, self.last - start))
        return self.model(self.ids[:, start:].contiguous(), cache=self.cache)[0][:, -1]

    def _empty_cache(self, padding: Tensor, capacity: int) -> KVCache:
        weight = self.model.lm_head.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        return KVCache(self.model.config, len(self.ids), capacity, weight.device,
                       torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype,
                       padding if padding.any() else None)

    def repeat(self, times: int) -> None:
        """ each row that often, one after the other, without computing it again """
        self.ids, self.padding, self.begin = (
            each.repeat_interleave(times, dim=0) for each in (self.ids, self.padding, self.begin))
        self.cache.data = self.cache.data.repeat_interleave(times, dim=2)
        if self.cache.padding is not None:
            self.cache.padding = self.cache.padding.repeat_interleave(times)


def _seen(ids: Tensor, padding: Tensor, V: int) -> Tensor:
    """ (B, V) bool: which ids a row has, its padding not counted """
    real = torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]   # (B, S)
    return torch.zeros(len(ids), V, dtype=torch.int32, device=ids.device).scatter_add(1, ids, real.int()) > 0


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling | None = None, *,
             num_samples: int = 1, seeds: list[int] | None = None, num_ids: int | None = None,
             is_over: Callable[[list[int]], bool] | None = None, on_token: Callable[[int, int], None] | None = None,
             exact_context: bool = False) -> list[list[int]]:
    """ the new tokens of num_samples continuations of each prompt, prompt by prompt, at most max_new_tokens each

    seeds: one for each continuation, its text does not depend on the others; without them torch's generator gives some.
    num_ids: the first ids only, where a padded vocabulary has more logits than tokens. is_over: called with the new
    tokens of a row, ends it when true; the token that did so is included. on_token(row, id) sees each token at once.
    exact_context: past block_size the last block_size tokens are seen, else at least half as many.
    """
    if not prompts or not all(prompts):
        raise ValueError("the prompt is empty, start with at least one token")
    sampling, rows = sampling or Sampling(), len(prompts) * num_samples
    if seeds is None:
        seeds = torch.randint(2**62, (rows,)).tolist()
    generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
    context = _Context(model, prompts, max_new_tokens, exact_context)
    texts, over = [[] for _ in range(rows)], [False] * rows
    for step in range(max_new_tokens):
        logits = context.logits()[:, :num_ids]                                # (B, V)
        if step == 0 and num_samples > 1:
            context.repeat(num_samples)
            logits = logits.repeat_interleave(num_samples, dim=0)
        penalized = sampling.repetition_penalty != 1
        seen = _seen(context.ids, context.padding, model.config.vocab_size)[:, :num_ids] if penalized else None
        next_ids = sampling.draw(sampling.scores(logits, seen), generators)   # (B, 1)
        context.ids = torch.cat((context.ids, next_ids), dim=1)
        for row, token in enumerate(next_ids[:, 0].tolist()):
            if over[row]:
                continue
            texts[row].append(token)
            if on_token:
                on_token(row, token)
            over[row] = bool(is_over and is_over(texts[row]))
        if all(over):
            break
    return texts


def generate_tensor(model: GPT, idx: Tensor, max_new_tokens: int, *, num_ids: int | None = None,
                    exact_context: bool = False, **options) -> Tensor:
    """ idx (B, T) with its continuations, (B, T + max_new_tokens); options are Sampling's """
    texts = generate(model, idx.tolist(), max_new_tokens, Sampling(**options), num_ids=num_ids,
                     exact_context=exact_context)
    return torch.cat((idx, torch.tensor(texts, dtype=idx.dtype, device=idx.device).view(len(idx), -1)), dim=1)
