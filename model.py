""" GPT: the whole model in one file, with the parameter names of OpenAI's GPT-2.

Sizes in the comments: B batch, T positions of the input, V vocabulary, C = n_embd channels,
nh = n_head heads of hs = C / nh channels each; with a cache, S positions that are seen, the T of the input last.
"""
import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """ the size and kind of a GPT; ValueError where the numbers do not fit together """
    block_size: int = 1024     # longest context, in tokens
    vocab_size: int = 50304    # GPT-2's 50257, rounded up to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True          # in linear and norm layers, as GPT-2; False is a little better and faster
    gelu: str = 'none'         # F.gelu's approximate=: 'none' is exact (erf), 'tanh' is what OpenAI trained GPT-2 with

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.gelu not in ('none', 'tanh'):
            raise ValueError(f"gelu='{self.gelu}' must be 'none' (exact) or 'tanh'")

    def model_args(self) -> dict:
        """ the fields as checkpoints hold them: those that nanoGPT does not know only if not at their default """
        known = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
        return {field.name: value for field in fields(self)
                if (value := getattr(self, field.name)) != field.default or field.name in known}


class CausalSelfAttention(nn.Module):
    """ every position gathers from the positions it may see, one pattern per head """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)   # query, key and value at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, recall: Callable | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)   # (B, nh, T, hs) each
                   for part in self.c_attn(x).split(C, dim=2))
        if recall:
            k, v = recall(k, v)                                                     # (B, nh, S, hs) each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, self.dropout if self.training else 0.0, is_causal)
        y = y.transpose(1, 2).reshape(B, T, C)                                      # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """ the same two-layer network at every position """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.gelu = config.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu)))   # C -> 4C -> C


class Block(nn.Module):
    """ attention between positions, then computation at each one; both add to the residual stream """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, recall: Callable | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), attn_mask, is_causal, recall)
        return x + self.mlp(self.ln_2(x))


class KVCache:
    """ keys and values of the positions that a model has seen, so that generating a token computes only its own

    batch_size rows of at most capacity positions. Rows of different lengths are padded on the left: padding (B,) says
    how many of a row's first positions are none. The model writes at length, and moves it on. While length is an int,
    only the positions before it are read. After fix_shapes it is a tensor, and all of the capacity is read, under a
    mask: the same shapes for every token, so that it can be compiled once and be a CUDA graph.
    """

    def __init__(self, config: GPTConfig, batch_size: int, capacity: int, device: str | torch.device = 'cpu',
                 dtype: torch.dtype = torch.float32, padding: Tensor | None = None):
        shape = batch_size, config.n_head, capacity, config.n_embd // config.n_head
        self.layers = [[torch.zeros(shape, device=device, dtype=dtype) for _ in 'kv'] for _ in range(config.n_layer)]
        self.capacity, self.length, self.padding = capacity, 0, padding

    def fix_shapes(self) -> None:
        """ from now on count the length on the device; whether there is room is not checked any more """
        self.length = torch.tensor(self.length, device=self.layers[0][0].device)

    def fill(self, other: 'KVCache', length: int, rows: slice | Tensor = slice(None)) -> None:
        """ let the positions before length end, in these rows, with what the other one holds """
        count = min(length, other.length)
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            for tensor, new in zip(ours, theirs, strict=True):
                tensor[rows, :, length - count:length] = new[:, :, other.length - count:other.length]

    def recall(self, layer: int, places: Tensor, S: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """ write k and v (B, nh, T, hs) at their places (T,), return those of the first S positions """
        keys, values = self.layers[layer]
        return keys.index_copy_(2, places, k)[:, :, :S], values.index_copy_(2, places, v)[:, :, :S]


class GPT(nn.Module):
    """ token ids in, logits over the next token out """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False   # keep only each block's input for backward and compute the rest again
        # the order of creation is the order of the random numbers, so that a seed gives nanoGPT's weights
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight   # tied, https://arxiv.org/abs/1608.05859
        self._init_weights()

    def _init_weights(self) -> None:
        """ GPT-2's: normal with std 0.02, biases 0, and projections into the residual stream scaled down """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # each block adds to the stream twice, so its variance would grow with 2 * n_layer
        for name, parameter in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def _embed(self, idx: Tensor, cache: KVCache | None, places: Tensor) -> Tensor:
        """ ids (B, T) to vectors (B, T, C): what the token is plus where it stands """
        if cache is None:
            positions = self.transformer.wpe.weight[:idx.shape[1]]            # (T, C)
        elif cache.padding is None:
            positions = self.transformer.wpe(places)                          # (T, C)
        else:   # a padded row begins later
            positions = self.transformer.wpe((places - cache.padding[:, None]).clamp(min=0))   # (B, T, C)
        return self.transformer.drop(self.transformer.wte(idx) + positions)

    def _visible(self, cache: KVCache | None, places: Tensor, S: int) -> tuple[Tensor | None, bool]:
        """ (attn_mask, is_causal) of one forward: the only place that decides which positions a position sees

        Text before an end-of-text token stays visible: documents are told apart by the token, as GPT-2 was trained.
        """
        T = len(places)
        if cache is None or S == T and cache.padding is None:
            return None, True
        if T == 1 and cache.padding is None and not isinstance(cache.length, Tensor):
            return None, False
        # is_causal would align the triangle at the first key, not at the last
        keys, queries = torch.arange(S, device=places.device), places[:, None]
        mask = keys <= queries                                                # (T, S)
        if cache.padding is not None:
            shown = keys >= cache.padding[:, None, None]                      # (B, 1, S)
            mask = (mask & shown | (keys == queries))[:, None]                # (B, 1, T, S), never a row of nothing
        return mask, False

    def forward(self, idx: Tensor, targets: Tensor | None = None, *,
                cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        """ logits and loss for token ids idx (B, T) int64, which continue what is in the cache, if there is one

        With targets (B, T): logits (B, T, V) and the mean cross-entropy in nats per token over targets != -1.
        Without: logits (B, 1, V) of the last position and None. ValueError if they do not fit block_size or the cache.
        """
        T, start = idx.shape[1], cache.length if cache else 0
        S = cache.capacity if isinstance(start, Tensor) else start + T
        if S > (limit := min(self.config.block_size, cache.capacity) if cache else self.config.block_size):
            raise ValueError(f"{S} tokens do not fit block_size={limit}, crop them")
        places = start + torch.arange(T, device=idx.device)    # (T,)
        x = self._embed(idx, cache, places)                    # (B, T, C)
        attn_mask, is_causal = self._visible(cache, places, S)
        for i, block in enumerate(self.transformer.h):
            if self.grad_checkpoint and self.training and not cache:
                x = checkpoint(block, x, attn_mask, is_causal, use_reentrant=False)   # https://arxiv.org/abs/1604.06174
            else:
                x = block(x, attn_mask, is_causal, partial(cache.recall, i, places, S) if cache else None)
        if cache:
            cache.length += T
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None               # (B, 1, V)
        logits = self.lm_head(x)                               # (B, T, V)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    # ---- size and cost

    def get_num_params(self, non_embedding: bool = True) -> int:
        """ number of parameters; the position table is left out by default, the token table is the head and counts """
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def flops_per_token(self) -> int:
        """ FLOPs of forward and backward for a token of a full context (PaLM, https://arxiv.org/abs/2204.02311, B)

        6 per parameter (a multiplication and an addition, three times: backward is two products for one), and for
        attention 12 * L * H * Q * T, which counts the full square of scores, masked or not.
        """
        attention = 12 * self.config.n_layer * self.config.n_embd * self.config.block_size   # H * Q = n_embd
        return 6 * self.get_num_params() + attention

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, *, peak_flops: float = 312e12) -> float:
        """ model FLOPS utilization, the share that is reached of peak_flops (FLOP/s; by default an A100's in bfloat16)

        fwdbwd_per_iter: sequences of block_size tokens per iteration; dt: seconds per iteration.
        """
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    def texts_in_memory(self, length: int) -> int:
        """ about how many texts of length tokens can be generated at once, in float32

        They may take half of a GPU's free memory, or a quarter of the machine's memory.
        """
        device, C, T = self.lm_head.weight.device, self.config.n_embd, min(length, self.config.block_size)
        memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 4 if hasattr(os, 'sysconf') else 2e9
        if device.type == 'cuda':
            memory = torch.cuda.mem_get_info(device)[0] / 2
        numbers = 2 * self.config.n_layer * C * T    # keys and values
        numbers += 20 * C * T + T * T                # a block's activations, and the mask, at the prompt
        numbers += 10 * self.config.vocab_size       # scores, their order, their sums in float64
        return max(1, int(memory / (4 * numbers)))

    def crop_block_size(self, block_size: int) -> None:
        """ shorten the longest context, in place; ValueError if it would grow """
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size} must be 1 to {self.config.block_size}, a model cannot grow")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight.detach()[:block_size].clone())

    # ---- training and sampling

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple[float, float],
                             device_type: str, *, eps: float = 1e-8) -> torch.optim.AdamW:
        """ AdamW that decays tensors of two or more dimensions (embeddings too) and leaves biases and norms alone """
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [{'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0}]
        fused = device_type in ('cuda', 'cpu')   # one kernel for the whole update
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)

    def new_cache(self, padding: Tensor, capacity: int) -> KVCache:
        """ an empty one for rows with this padding (B,), in the type that the products have, also under autocast """
        x = self.transformer.wte.weight[:1]
        dtype = self.transformer.h[0].attn.c_attn(x).dtype
        return KVCache(self.config, len(padding), capacity, x.device, dtype, padding if padding.any() else None)

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 **options) -> Tensor:
        """ idx (B, T) with max_new_tokens more tokens, each drawn from the softmax of logits / temperature

        temperature 0 takes the likeliest token. top_k keeps the k likeliest, None or 0 keeps all. options: num_ids,
        seeds and exact_context of engine.stream.
        """
        from engine import Sampling, generate
        texts = generate(self, idx.tolist(), max_new_tokens, Sampling(temperature, top_k), **options)
        return torch.cat((idx, torch.tensor(texts, dtype=idx.dtype, device=idx.device)), dim=1)


# ---- a model for weights that come from elsewhere

class _NoInit(TorchFunctionMode):
    """ leaves out torch.nn.init, which on the meta device would do nothing but import half of PyTorch """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, '__module__', '') == 'torch.nn.init':
            return args[0] if args else kwargs['tensor']
        return function(*args, **kwargs or {})


def empty_model(config: GPTConfig) -> GPT:
    """ a model that takes no memory and no random numbers until load_state_dict(..., assign=True) """
    with torch.device('meta'), _NoInit():
        return GPT(config)


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
