""" Generation: prompts in, tokens out, all rows of a batch at once and with a KV cache.

    model = prepare(model, rows=1)   # optional, for speed
    tokens = generate(model, [[464, 3290]], max_new_tokens=20, sampling=Sampling(temperature=0.8, top_k=200))[0]

GPT.generate is a thin door to it. What is not here: the model (model.py), text (sample.py).
"""
import contextlib
import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import GPT, KVCache

# ---- sampling

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
        self.temperature *= self.temperature >= 1e-6   # less would overflow float32

    def scores(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """ logits (B, V) as float32 scores, -inf for what cannot be drawn; seen (B, V): which ids the text has

        In the order of Hugging Face's processors: repetition penalty, temperature, top_k, top_p, min_p.
        """
        scores = logits.float()
        if not scores.isfinite().all():
            raise ValueError("the model's logits are not finite, its weights are damaged")
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
        probabilities = F.softmax(scores.cpu() if scores.is_mps else scores, dim=-1)   # MPS has no float64
        total = probabilities.double().cumsum(dim=-1)                         # (B, V)
        dice = torch.cat([torch.rand(1, 1, generator=each, dtype=torch.float64) for each in generators])
        ids = torch.searchsorted(total, dice.to(total.device) * total[:, -1:], right=True)   # the first sum above it
        return ids.to(scores.device)


# ---- weights

def _int8(x: Tensor, q: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """ x @ (q * scale).T for int8 q (out, in) and the scale of each output (out,) """
    rows = x.flatten(0, -2)
    few = len(rows) <= 32 and rows.shape[1] % 16 == 0   # the kernel reads the weights again and again, 16 at once
    y = torch._weight_int8pack_mm(rows, q, scale) if few else F.linear(rows, q.to(x.dtype)) * scale
    return y.view(*x.shape[:-1], -1) + (0 if bias is None else bias)


class _Product(nn.Module):
    """ a linear layer with its weight stored as product(x, weight, bias) wants it; computes in dtype, like autocast """

    def __init__(self, product: Callable, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.product, self.dtype = product, dtype
        self.register_buffer('weight', weight)   # as attributes, a CUDA graph would copy them every time
        self.register_buffer('bias', None if bias is None else bias.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.to(self.dtype), self.weight, self.bias)


def _plain(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    weight = linear.weight.detach()
    return linear if weight.dtype == dtype else _Product(F.linear, weight.to(dtype), linear.bias, dtype)


def _packed(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """ in oneDNN's blocked layout; the two operations are those that torch.compile makes of frozen weights """
    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), 16)   # for about so many rows
    return _Product(lambda x, weight, bias: torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], ''),
                    weight, linear.bias, dtype)


def _quantized(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """ torchao's int8 weights, each output with its scale; on the CPU PyTorch has the quicker kernel for them """
    logging.disable(logging.WARNING)   # of parts of torchao that are not used here
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ValueError("quantize=int8 needs torchao: pip install torchao") from None
    finally:
        logging.disable(logging.NOTSET)
    dtype = torch.bfloat16   # the only one that is fast
    quantize_(layer := nn.Sequential(copy.deepcopy(linear).to(dtype)), Int8WeightOnlyConfig())
    weight = layer[0].weight
    if weight.device.type == 'cpu':
        return _Product(partial(_int8, scale=weight.scale.flatten().to(dtype)), weight.qdata, linear.bias, dtype)
    return _Product(F.linear, weight, linear.bias, dtype)


def _faster(linears: list[nn.Linear], dtype: torch.dtype, rows: int) -> Callable:
    """ _packed or _plain: which takes less time for rows vectors and these weights of one shape """
    from torch.utils.benchmark import Timer
    weight, times = linears[0].weight, {}
    some = linears[:1 + 2**26 // weight.nbytes]   # 64 MB are more than caches hold, mostly
    x = torch.randn(rows, 1, weight.shape[1]).to(dtype)
    with contextlib.suppress(RuntimeError, AttributeError):   # without oneDNN _plain alone works
        for kind in (_plain, _packed):
            variables = {'layers': [kind(linear, dtype) for linear in some], 'x': x}
            timer = Timer('for layer in layers: layer(x)', globals=variables, num_threads=torch.get_num_threads())
            times[kind] = timer.timeit(4).mean
    return min(times, key=times.get)


@torch.no_grad()
def prepare(model: GPT, dtype: torch.dtype | None = None, *, rows: int = 1, quantize: str = '') -> GPT:
    """ a copy of the model for generating rows texts at once, with its products in dtype; the model stays as it is

    On the CPU the layout of each weight is the one that is measured to be faster. quantize='int8' stores weights in 8
    bits. What need not differ is shared with the model. ValueError for another word, or without torchao.
    """
    if quantize not in ('', 'int8'):
        raise ValueError(f"quantize={quantize} is not int8")
    dtype = dtype or model.lm_head.weight.dtype
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()}).eval()
    by_shape, on_cpu = {}, model.lm_head.weight.device.type == 'cpu'
    for layer in model.modules():
        for name, linear in layer.named_children():
            if isinstance(linear, nn.Linear):
                by_shape.setdefault(linear.weight.shape, []).append((layer, name, linear))
    for group in by_shape.values():
        linears = [linear for _, _, linear in group]
        convert = _quantized if quantize else _faster(linears, dtype, rows) if on_cpu else _plain
        for layer, name, linear in group:
            setattr(layer, name, convert(linear, dtype))
    return model


# ---- generating on a GPU without waiting for Python

STATIC = dict(fullgraph=True, dynamic=False, mode='reduce-overhead')   # for torch.compile


class CompiledStep:
    """ one token for each row, by torch.compile(model, **STATIC): compiled once for so many rows, on CUDA one graph

    A graph wants the same shapes and addresses each time, so this has caches of its own, of full size.
    """

    def __init__(self, compiled: GPT):
        self.model, self.caches = compiled, {}   # by the number of rows

    def adopt(self, cache: KVCache) -> KVCache:
        """ the fixed cache for as many rows, holding what this one holds """
        if isinstance(cache.length, Tensor):
            return cache
        keys, config = cache.layers[0][0], self.model.config
        if (rows := len(keys)) not in self.caches:
            padding = torch.zeros(rows, dtype=torch.int64, device=keys.device)
            fixed = KVCache(config, rows, config.block_size, keys.device, keys.dtype, padding)
            self.caches[rows] = fixed
            fixed.fix_shapes()
            for tensor in (fixed.length, fixed.padding, *itertools.chain(*fixed.layers)):
                torch._dynamo.mark_static_address(tensor)
        fixed = self.caches[rows]
        fixed.fill(cache, cache.length)
        fixed.length.fill_(cache.length)
        fixed.padding[:] = 0 if cache.padding is None else cache.padding
        return fixed

    def __call__(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, None]:
        """ what the model returns, logits (B, 1, V) and None """
        return self.model(ids, cache=cache)[0].clone(), None   # the next run of the graph overwrites it


# ---- the text so far

class _Context:
    """ the text so far, ids (B, S), the place where each row's window begins, and what the model has computed of it """

    def __init__(self, model: GPT, prompts: list[list[int]], max_new_tokens: int, exact: bool,
                 step: CompiledStep | None):
        self.model, self.exact, self.step, self.limit = model, exact, step, model.config.block_size
        longest, device = max(map(len, prompts)), model.transformer.wte.weight.device
        self.padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)           # (B,)
        self.ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        self.begin = self.padding.clamp(min=longest - self.limit)                                           # (B,)
        self.last, self.cache = longest + max_new_tokens, None

    def logits(self) -> Tensor:
        """ (B, V) for the next token

        A full window cannot slide: positions are counted from its start, so every key would change. Its row goes on
        with the recent half, computed anew once in half a block_size of tokens; with exact, with all but the first
        token, as in nanoGPT, at the price of a forward over all of them for each. No row's window depends on another's.
        """
        if not self.cache:
            start = self.begin.min().item()
            self.cache = self.model.new_cache(self.begin - start, min(self.limit, self.last - start))
            return self.model(self.ids[:, start:].contiguous(), cache=self.cache)[0][:, -1]
        full = self.ids.shape[1] - self.begin > self.limit                    # (B,)
        if full.any():
            self._renew(full)
        if self.step:
            self.cache = self.step.adopt(self.cache)
        # a compiled step wants the same strides every time, and for one row .contiguous() keeps those of ids
        newest = self.ids[:, -1:].clone(memory_format=torch.contiguous_format)
        return (self.step or self.model)(newest, cache=self.cache)[0][:, -1]

    def _renew(self, full: Tensor) -> None:
        """ another cache, where the windows of these rows (B,) bool are shorter and end at the last token but one """
        S, kept = self.ids.shape[1], self.limit if self.exact else max(self.limit // 2, 1)
        self.begin = self.begin.where(~full, S - kept)
        length = S - 1 - self.begin.min().item()
        cache = self.model.new_cache(self.begin - self.begin.min(), self.limit)
        cache.fill(self.cache, length)
        if kept > 1:
            recent = self.model.new_cache(self.padding.new_zeros(full.sum()), kept)
            self.model(self.ids[full, S - kept:S - 1], cache=recent)
            cache.fill(recent, length, full)
        cache.length, self.cache = length, cache

    def select(self, rows: list[int]) -> None:
        """ go on with these rows, in this order; one may be there several times """
        rows = torch.tensor(rows, device=self.ids.device)
        self.ids, self.padding, self.begin = self.ids[rows], self.padding[rows], self.begin[rows]
        self.cache.layers = [(keys[rows], values[rows]) for keys, values in self.cache.layers]
        if self.cache.padding is not None:
            self.cache.padding = self.cache.padding[rows]

    def seen(self) -> Tensor:
        """ (B, V) bool: which ids a row has, its padding not counted """
        B, S = self.ids.shape
        real = torch.arange(S, device=self.ids.device) >= self.padding[:, None]   # (B, S)
        counts = torch.zeros(B, self.model.config.vocab_size, dtype=torch.int32, device=self.ids.device)
        return counts.scatter_add(1, self.ids, real.int()) > 0


# ---- generation

def _stream_batch(context: _Context, rows: list[int], origin: list[int], max_new_tokens: int, sampling: Sampling,
                  seeds: list[int], num_ids: int | None, is_over: Callable | None) -> Iterator[tuple[int, int, bool]]:
    """ stream for one batch: these rows, and which prompt of the context each one continues """
    generators = {row: torch.Generator().manual_seed(seeds[row] % 2**63) for row in rows}
    texts, over = {row: [] for row in rows}, set()
    for count in range(1, max_new_tokens + 1):
        logits = context.logits()[:, :num_ids]                                # (B, V)
        if count == 1:   # a prompt is computed once for all its samples
            context.select(origin)
            logits = logits[origin]
        seen = context.seen()[:, :num_ids] if sampling.repetition_penalty != 1 else None
        ids = sampling.draw(sampling.scores(logits, seen), [generators[row] for row in rows])   # (B, 1)
        context.ids = torch.cat((context.ids, ids), dim=1)
        for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
            if row not in over:
                texts[row].append(token)
                if last := count == max_new_tokens or bool(is_over and is_over(texts[row])):
                    over.add(row)
                yield row, token, last
        if len(over) == len(texts):
            return
        if over.intersection(rows) and context.step is None:   # a compiled step computes them to the end
            context.select([i for i, row in enumerate(rows) if row not in over])
            rows = [row for row in rows if row not in over]


@torch.no_grad()
def stream(model: GPT, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling | None = None, *,
           num_samples: int = 1, seeds: list[int] | None = None, num_ids: int | None = None,
           is_over: Callable[[list[int]], bool] | None = None, exact_context: bool = False,
           step: CompiledStep | None = None, most_rows: int | None = None) -> Iterator[tuple[int, int, bool]]:
    """ (row, id, last) for each token when it is drawn: num_samples continuations of each prompt, rows prompt by prompt

    At most max_new_tokens each; is_over, called with a row's new tokens, ends it when true, that token included.
    seeds: one for each row, whose text does not depend on the others; without them torch's generator gives some.
    num_ids: the first ids only, where a padded vocabulary has more logits than tokens. exact_context: past block_size
    the last block_size tokens are seen, else at least half as many. most_rows: in one batch, else what memory allows.
    """
    if not prompts or not all(prompts):
        raise ValueError("the prompt is empty, start with at least one token")
    seeds = seeds or torch.randint(2**32, (len(prompts) * num_samples,)).tolist()
    assert len(seeds) == len(prompts) * num_samples, "a seed for each row"
    most_rows = most_rows or model.texts_in_memory(max(map(len, prompts)) + max_new_tokens)
    for begin in range(0, len(seeds), most_rows):
        rows = list(range(begin, min(begin + most_rows, len(seeds))))
        first, last = rows[0] // num_samples, rows[-1] // num_samples
        context = _Context(model, prompts[first:last + 1], max_new_tokens, exact_context, step)
        yield from _stream_batch(context, rows, [row // num_samples - first for row in rows], max_new_tokens,
                                 sampling or Sampling(), seeds, num_ids, is_over)


def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling | None = None,
             **options) -> list[list[int]]:
    """ the new tokens of each row, when all are there; options are those of stream """
    texts = [[] for _ in range(len(prompts) * options.get('num_samples', 1))]
    for row, token, _ in stream(model, prompts, max_new_tokens, sampling, **options):
        texts[row].append(token)
    return texts
