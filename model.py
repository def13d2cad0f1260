""" GPT: the whole model in one file, with the parameter names of OpenAI's GPT-2.

Sizes in the comments: B batch, T positions of the input, V vocabulary, C = n_embd channels, nh = n_head heads of
hs = C / nh channels each (keys and values may have fewer heads); with a cache, S positions that are seen, the T of the
input last.
"""
import hashlib
import importlib.util
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

NANOGPT = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')   # the options that it has
TRITON = importlib.util.find_spec('triton')   # which FlexAttention is compiled with


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
    norm_eps: float = 1e-5     # added to the variance in the norm layers
    tie: bool = True           # head and token embedding are one matrix, https://arxiv.org/abs/1608.05859
    pos: str = 'learned'       # a table; 'rope' (arXiv 2104.09864) or 'alibi' (arXiv 2108.12409)
    rope_base: float = 10000.0
    window: int = 0            # a position sees so many, itself included, 0: all before it (arXiv 2004.05150)
    n_kv_head: int = 0         # heads of keys and values, each for a group of queries (arXiv 2305.13245), 0: n_head
    qk_norm: bool = False      # each query and key gets a mean square of 1 (arXiv 2010.04245)

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'window', 'n_kv_head'):
            least = 0 if name in ('window', 'n_kv_head') else 1
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        for name, known in dict(gelu=('none', 'tanh'), pos=('learned', 'rope', 'alibi'), tie=(True, False),
                                qk_norm=(True, False)).items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} must be {' or '.join(map(repr, known))}")
        for name, good, wanted in (
                ('n_embd', self.n_embd % self.n_head == 0, f"a multiple of n_head={self.n_head}"),
                ('n_embd', self.pos != 'rope' or self.n_embd // self.n_head % 2 == 0, "an even number a head for rope"),
                ('n_kv_head', self.n_head % (self.n_kv_head or 1) == 0, f"0 or a divisor of n_head={self.n_head}"),
                ('dropout', 0 <= self.dropout < 1, "at least 0 and below 1"),
                ('norm_eps', isinstance(self.norm_eps, float | int) and 0 < self.norm_eps < 1, "above 0 and below 1"),
                ('rope_base', self.rope_base > 1, "above 1")):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {wanted}")

    @classmethod
    def of(cls, config: dict, **changes) -> 'GPTConfig':
        """ what a script's configuration has of it, with changes """
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config} | changes)

    def model_args(self) -> dict:
        """ the fields as checkpoints hold them: those that nanoGPT does not know only if not at their default """
        return {field.name: value for field in fields(self)
                if (value := getattr(self, field.name)) != field.default or field.name in NANOGPT}


# ---- positions, and which of them are seen

def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """ RoPE: x (B, T, heads, hs) with channels i and i + hs/2 turned by an angle; cos and sin (T, 1, hs) float32

    The product of a query and a key that were turned in proportion to their positions depends on the distance only.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def alibi_slopes(n_head: int, device: str | torch.device = 'cpu') -> Tensor:
    """ (nh,) how much a head's scores fall with each position of distance, from 1/2 to 1/256 for 8 heads

    Geometric for powers of two; others get those of the power below, and of the one above every second.
    """
    power = 1 << n_head.bit_length() - 1
    head = torch.arange(n_head, device=device)
    return 2 ** -torch.where(head < power, (head + 1) * 8 / power, (2 * (head - power) + 1) * 4 / power)


@lru_cache
def sparse_attention(T: int, window: int, alibi_heads: int, device: torch.device) -> Callable:
    """ causal attention of (q, k, v) by a kernel compiled for a window and ALiBi, which skips what is out of sight """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    slopes = alibi_slopes(alibi_heads, device) if alibi_heads else None

    def seen(batch, head, query, key):
        return (key <= query) & (key > query - (window or T))

    def nearer(score, batch, head, query, key):
        return score if slopes is None else score + slopes[head] * (key - query)
    kernel = partial(torch.compile(flex_attention), score_mod=nearer, enable_gqa=True,
                     block_mask=create_block_mask(seen, None, None, T, T, device))
    return lambda *qkv: kernel(*(each.contiguous() for each in qkv))   # as views PyTorch 2.13 misreads them on the CPU


# ---- layers

class CausalSelfAttention(nn.Module):
    """ every position gathers from the positions it may see, one pattern per head """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.hs, n_kv_head = config.n_embd // config.n_head, config.n_kv_head or config.n_head
        self.heads = config.n_head, n_kv_head, n_kv_head       # of queries, keys and values
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * self.hs, bias=config.bias)   # all three at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout, self.qk_norm = config.dropout, config.qk_norm

    def forward(self, x: Tensor, attn_mask: Tensor | Callable | None, is_causal: bool,
                rotation: tuple[Tensor, Tensor] | None = None, recall: Callable | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, -1, self.hs).split(self.heads, dim=2)   # (B, T, nh, hs) each
        if self.qk_norm:
            q, k = F.rms_norm(q, (self.hs,)), F.rms_norm(k, (self.hs,))
        if rotation:
            q, k = turned(q, *rotation), turned(k, *rotation)
        q, k, v = (each.type_as(v).transpose(1, 2) for each in (q, k, v))           # (B, nh, T, hs) each
        if recall:
            k, v = recall(k, v)                                                     # (B, nh, S, hs) each
        if callable(attn_mask):
            y = attn_mask(q, k, v)
        else:
            attn_mask = attn_mask.type_as(q) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
            y = F.scaled_dot_product_attention(q, k, v, attn_mask, self.dropout if self.training else 0.0, is_causal,
                                               enable_gqa=self.heads[0] > self.heads[1])
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
        self.ln_1 = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *how) -> Tensor:
        """ x (B, T, C); how: CausalSelfAttention's other arguments """
        x = x + self.attn(self.ln_1(x), *how)
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
        shape = batch_size, config.n_kv_head or config.n_head, capacity, config.n_embd // config.n_head
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


FUSED = ('cuda', 'cpu')   # devices that have one kernel for AdamW's whole update
CHUNK = 2**25   # logits at once where only the loss is wanted: 64 MB in float32; a GPU wants larger products


class _ChunkedLoss(torch.autograd.Function):
    """ the head and its cross-entropy for some rows at a time, whose logits turn into gradients and go """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        most = max(1, CHUNK * (8 if x.is_cuda else 1) // len(weight))
        rows = -(-len(x) // -(-len(x) // most))                     # equal shares
        dtype = F.linear(x[:1], weight).dtype                       # autocast's
        W, counts = weight.to(dtype), targets != -1
        total, number = torch.zeros((), device=x.device), counts.sum().clamp(min=1)
        dx, dW = (torch.zeros_like(each) if wanted else None
                  for each, wanted in zip((x, weight), ctx.needs_input_grad, strict=False))
        buffer = x.new_empty(rows, len(weight), dtype=dtype)        # fresh memory for each part would cost more time
        for begin in range(0, len(x), rows):
            part = slice(begin, begin + rows)
            inputs, target = x[part].to(dtype), targets[part, None].clamp(min=0)
            logits = torch.mm(inputs, W.t(), out=buffer[:len(inputs)]).float()   # (rows, V)
            correct, highest = logits.gather(1, target), logits.amax(-1, keepdim=True)
            sums = logits.sub_(highest).exp_().sum(-1, keepdim=True)
            total += ((sums.log() + highest - correct)[:, 0] * counts[part]).sum()
            # softmax - one-hot; not yet divided by the number: small numbers are 0 in float16
            wanted = counts[part, None].float()
            grad = logits.mul_(wanted / sums).scatter_add_(1, target, -wanted).to(dtype)
            if dx is not None:
                dx[part] = grad @ W
            if dW is not None:
                dW.addmm_(grad.t(), inputs) if dtype == dW.dtype else dW.add_(grad.t() @ inputs)
        ctx.save_for_backward(dx, dW, number)
        return total / number

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        *sums, number = ctx.saved_tensors
        return *(each if each is None else each * (grad / number) for each in sums), None


class GPT(nn.Module):
    """ token ids in, logits over the next token out """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False   # keep only each block's input for backward and compute the rest again
        self.frozen = 0                # so many parts, the embeddings and then the blocks, get no gradient
        # the order of creation is the order of the random numbers, so that a seed gives nanoGPT's weights
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            **({'wpe': nn.Embedding(config.block_size, config.n_embd)} if config.pos == 'learned' else {}),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self._init_weights()

    def tie_weights(self) -> None:
        """ make head and token embedding one parameter, if config says so """
        if self.config.tie:
            self.transformer.wte.weight = self.lm_head.weight

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

    def _embed(self, idx: Tensor, cache: KVCache | None, positions: Tensor) -> Tensor:
        """ ids (B, T) to vectors (B, T, C): what the token is plus, with a table, where it stands """
        x = self.transformer.wte(idx)
        if self.config.pos == 'learned':
            x = x + (self.transformer.wpe(positions) if cache else self.transformer.wpe.weight[:idx.shape[1]])
        return self.transformer.drop(x)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """ RoPE: cos and sin (T, 1, hs) float32 of what is turned by at positions (T,); for (B, T) also with B """
        if self.config.pos != 'rope':
            return None
        hs = self.config.n_embd // self.config.n_head
        speeds = self.config.rope_base ** (torch.arange(0, hs, 2, device=positions.device) / -hs)   # (hs/2,)
        angles = (positions[..., None] * speeds)[..., None, :]                                      # (T, 1, hs/2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def _visible(self, cache: KVCache | None, places: Tensor, S: int) -> tuple[Tensor | Callable | None, bool]:
        """ (attn_mask, is_causal) of one forward: the only place that decides which positions a position sees

        Text before an end-of-text token stays visible: documents are told apart by the token, as GPT-2 was trained.
        """
        T, device, window, padding = len(places), places.device, self.config.window, cache.padding if cache else None
        alibi_heads = self.config.n_head if self.config.pos == 'alibi' else 0
        if not alibi_heads and not 0 < window < S:   # all before, and nothing else
            if cache is None or S == T and padding is None:
                return None, True
            if T == 1 and padding is None and not isinstance(cache.length, Tensor):
                return None, False
        if (TRITON and places.is_cuda and cache is None and not (self.training and self.config.dropout)
                and self.transformer.h[0].attn.hs >= 16):
            build = torch.compiler.disable(sparse_attention)   # a forward that is compiled would build it each time
            return build(T, window, alibi_heads, device), False
        keys, queries = torch.arange(S, device=device), places[:, None]
        mask = keys <= queries       # (T, S); is_causal would align the triangle at the first key, not at the last
        if window:
            mask = mask & (keys > queries - window)
        if padding is not None:
            shown = keys >= padding[:, None, None]                            # (B, 1, S)
            mask = (mask & shown | (keys == queries))[:, None]                # (B, 1, T, S), never a row of nothing
        if alibi_heads:
            scores = alibi_slopes(alibi_heads, device)[:, None, None] * (keys - queries)   # (nh, T, S)
            mask = scores.masked_fill(~mask, -math.inf)
        return mask, False

    def forward(self, idx: Tensor, targets: Tensor | None = None, *, cache: KVCache | None = None,
                loss_only: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """ logits and loss for token ids idx (B, T) int64, which continue what is in the cache, if there is one

        With targets (B, T): logits (B, T, V), or None with loss_only, which saves the memory for them, and the mean
        cross-entropy in nats per token over targets != -1. Without: logits (B, 1, V) of the last position and None.
        ValueError if they do not fit block_size or the cache.
        """
        T, start = idx.shape[1], cache.length if cache else 0
        S = cache.capacity if isinstance(start, Tensor) else start + T
        if S > (limit := min(self.config.block_size, cache.capacity) if cache else self.config.block_size):
            raise ValueError(f"{S} tokens do not fit block_size={limit}, crop them")
        places = start + torch.arange(T, device=idx.device)    # (T,)
        padded = cache is not None and cache.padding is not None   # then a row's text begins later
        positions = (places - cache.padding[:, None]).clamp(min=0) if padded else places   # (B, T) or (T,)
        x = self._embed(idx, cache, positions)                 # (B, T, C)
        how = *self._visible(cache, places, S), self._rotation(positions)
        for i, block in enumerate(self.transformer.h):
            x = x.detach() if i < self.frozen else x           # backward ends here
            if self.grad_checkpoint and self.training and not cache:
                x = checkpoint(block, x, *how, use_reentrant=False)   # https://arxiv.org/abs/1604.06174
            else:
                x = block(x, *how, partial(cache.recall, i, places, S) if cache else None)
        if cache:
            cache.length += T
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None               # (B, 1, V)
        if loss_only and targets.numel() * self.config.vocab_size > CHUNK:
            return None, _ChunkedLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        logits = self.lm_head(x)                               # (B, T, V)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    # ---- size and cost

    def get_num_params(self, non_embedding: bool = True) -> int:
        """ number of parameters, by default without the position table; the token table counts, tied it is the head """
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding and self.config.pos == 'learned' else total

    def flops_per_token(self) -> int:
        """ FLOPs of forward and backward for a token of a full context (PaLM, https://arxiv.org/abs/2204.02311, B)

        6 per parameter (a multiplication and an addition, three times: backward is two products for one), and for
        attention 12 * L * H * Q * T, which counts the full square of scores, masked or not, but for a window's.
        """
        T = min(self.config.block_size, self.config.window or self.config.block_size)
        attention = 12 * self.config.n_layer * self.config.n_embd * T                        # H * Q = n_embd
        looked_up = 0 if self.config.tie else self.transformer.wte.weight.numel()            # and not multiplied
        return 6 * (self.get_num_params() - looked_up) + attention

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
        masks = self.config.n_head if self.config.pos == 'alibi' or self.config.n_kv_head else 1
        numbers = (2 * self.config.n_layer + 20) * C * T   # keys and values, at most, and a block's activations
        numbers += masks * T * T + 10 * self.config.vocab_size   # at the prompt; scores, their order and sums
        return max(1, int(memory / (4 * numbers)))

    def crop_block_size(self, block_size: int) -> None:
        """ shorten the longest context, in place, or lengthen it where no table limits it; ValueError if one does """
        most = self.config.block_size if self.config.pos == 'learned' else 2**30
        if not 1 <= block_size <= most:
            raise ValueError(f"block_size={block_size} must be 1 to {most}, the longest that this model can have")
        self.config.block_size = block_size
        if self.config.pos == 'learned':
            table = self.transformer.wpe.weight
            self.transformer.wpe.weight = nn.Parameter(table.detach()[:block_size].clone(), table.requires_grad)

    # ---- training and sampling

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict | None = None) -> 'GPT':
        """ GPT-2 with OpenAI's weights: gpt2, gpt2-medium, gpt2-large or gpt2-xl, or whatever has their format

        model_type: one of them, another name on the Hugging Face Hub, or a folder with config.json and
        model.safetensors or pytorch_model.bin. override_args: {'dropout': ...}. ValueError says why it cannot be.
        """
        return read_gpt2(model_type, override_args or {})

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple[float, float],
                             device_type: str, *, eps: float = 1e-8, muon_lr: float = 0.0) -> torch.optim.AdamW:
        """ AdamW that decays tensors of two or more dimensions (embeddings too) and leaves biases and norms alone

        muon_lr: Muon's rate for the matrices in the blocks, where learning_rate is that of the others; 0: without.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        matrices = [p for p in self.transformer.h.parameters() if p.requires_grad and p.dim() == 2 and muon_lr]
        apart = {id(p) for p in matrices}
        groups = [{'params': [p for p in parameters if p.dim() >= 2 and id(p) not in apart],
                   'weight_decay': weight_decay},
                  {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0}]
        kind = torch.optim.AdamW
        if matrices:
            from optim import Muon as kind
            groups.append({'params': matrices, 'weight_decay': weight_decay, 'momentum': 0.95,
                           'lr': muon_lr, 'lr_scale': muon_lr / learning_rate})
        return kind(groups, lr=learning_rate, betas=betas, eps=eps, fused=device_type in FUSED)

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


# ---- GPT-2's weights, from the Hugging Face Hub or a folder in its format

# config.json's keys with transformers' defaults: those that we have, and those that are refused at any other value
OURS = {'n_positions': 1024, 'vocab_size': 50257, 'n_layer': 12, 'n_head': 12, 'n_embd': 768,
        'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True, 'activation_function': 'gelu_new'}
FIXED = {'model_type': 'gpt2', 'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False,
         'add_cross_attention': False}
GELU = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu_fast': 'tanh', 'gelu': 'none'}
TOKENIZER = 'nanogpt_tokenizer.json'   # beside config.json in a folder of export.py: how make_tokenizer makes it
SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
CONV1D = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')   # stored as (in, out)


def _gpt2_file(source: str, name: str) -> str | None:
    """ path of a file in a folder, or of a model on the Hub; None if there is none of that name """
    if os.path.isdir(source):
        return path if os.path.exists(path := os.path.join(source, name)) else None
    if source.count('/') != 1 and source not in SIZES or source.startswith(('.', '/', '~')):
        raise ValueError(f"--init_from={source} is none of scratch, resume, auto, ckpt:PATH, {', '.join(SIZES)}, "
                         "no folder, and no name on the Hugging Face Hub (owner/model)")
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache
    repository = source if '/' in source else f'openai-community/{source}'
    try:
        return hf_hub_download(repository, name)
    except errors.LocalEntryNotFoundError:
        if try_to_load_from_cache(repository, name):   # it remembers that there is none
            return None
        reason = "no connection, and no copy from before"
    except errors.EntryNotFoundError:
        return None
    except Exception as error:   # no such model, no permission, a full disk, ...
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise ValueError(f"'{source}' cannot be had from the Hugging Face Hub ({reason}); give a folder instead that has "
                     "its config.json and model.safetensors")


def read_json(path: str) -> dict:
    """ the object in a JSON file; ValueError names a damaged one """
    try:
        with open(path, encoding='utf-8') as file:
            return dict(json.load(file))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def _gpt2_config(source: str, overrides: dict) -> GPTConfig:
    """ the sizes and kind that config.json tells; ValueError names what this model does not have """
    if not (path := _gpt2_file(source, 'config.json')):
        raise ValueError(f"'{source}' has no config.json")
    said = {**OURS, **FIXED, **read_json(path)}
    wrong = [key for key in FIXED if said[key] != FIXED[key]]
    wrong += ['n_inner'] * (said.get('n_inner') not in (None, said['n_embd'] and 4 * said['n_embd']))
    wrong += ['activation_function'] * (str(said['activation_function']) not in GELU)
    if wrong:
        raise ValueError(f"'{source}' is no GPT-2 as it is here: {', '.join(f'{k}={said[k]!r}' for k in wrong)}")
    if {*overrides} - {'dropout'}:
        raise ValueError(f"only dropout can be overridden in a pretrained model, not {', '.join(overrides)}")
    return GPTConfig(said['n_positions'], *(said[key] for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd')),
                     gelu=GELU[said['activation_function']], norm_eps=said['layer_norm_epsilon'],
                     tie=said['tie_word_embeddings'], **overrides)


def _gpt2_tensors(source: str) -> Iterator[tuple[str, Tensor]]:
    """ the names and weights in all its files, as views of the files """
    from safetensors import safe_open
    for name in ('model.safetensors', 'pytorch_model.bin'):
        files = [_gpt2_file(source, name)]
        if not files[0] and (index := _gpt2_file(source, f'{name}.index.json')):   # the weights are in several files
            files = [_gpt2_file(source, part) for part in sorted({*read_json(index).get('weight_map', {}).values()})]
            if None in files or not files or any(os.path.dirname(each) != os.path.dirname(index) for each in files):
                raise ValueError(f"'{source}' lacks a file that its {name}.index.json should name")
        if files[0]:
            break
    else:
        raise ValueError(f"'{source}' has neither model.safetensors nor pytorch_model.bin")
    for path in files:
        if name.endswith('.bin'):
            yield from torch.load(path, 'cpu', weights_only=True, mmap=zipfile.is_zipfile(path)).items()
            continue
        with safe_open(path, 'pt') as file:
            # the largest first, because pages of the file that were read count as memory until it is closed
            names = sorted(file.keys(), key=lambda key: -math.prod(file.get_slice(key).get_shape()))
        for key in names:
            with safe_open(path, 'pt') as file:
                yield key, file.get_tensor(key)


def read_gpt2(source: str, overrides: dict) -> GPT:
    """ see GPT.from_pretrained """
    model, weights = empty_model(_gpt2_config(source, overrides)), {}
    try:
        for name, tensor in _gpt2_tensors(source):
            name = name if name.startswith('lm_head.') else f'transformer.{name.removeprefix("transformer.")}'
            if name.endswith(('.attn.bias', '.attn.masked_bias')) or model.config.tie and name == 'lm_head.weight':
                continue   # the causal mask, or what is wte
            if not tensor.is_floating_point():
                raise ValueError(f"'{source}' has a {name} of {tensor.dtype}, which is no weight of a GPT-2")
            tensor = tensor.t() if name.endswith(CONV1D) else tensor
            weights[name] = torch.empty(tensor.shape).copy_(tensor)   # contiguous, float32
        if model.config.tie:
            weights['lm_head.weight'] = weights.get('transformer.wte.weight')
        model.load_state_dict(weights, assign=True)
    except ValueError:
        raise
    except Exception as error:   # safetensors and the loader of .bin have many kinds for a damaged file
        raise ValueError(f"'{source}' has other weights than its config.json says, or is damaged: "
                         f"{' '.join(str(error).split())[:300]}") from None
    model.tie_weights()   # which were assigned one by one
    return model


# ---- LoRA, https://arxiv.org/abs/2106.09685

class LoRALinear(nn.Linear):
    """ a linear layer that stays as it is, plus a trained one of low rank: W x + b + (alpha / rank) B A dropout(x) """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias   # shared with base, not copied
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))   # so it begins as base
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale, self.lora_dropout = alpha / rank, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(self.lora_dropout(x), self.lora_A)                         # (B, T, rank)
        return super().forward(x) + F.linear(low, self.lora_B) * self.scale

    def merged(self) -> nn.Linear:
        """ an ordinary layer that computes the same; the sum is rounded once """
        change = self.lora_B.double() @ self.lora_A.double() * self.scale
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device='meta')
        plain.weight, plain.bias = nn.Parameter((self.weight + change).to(self.weight.dtype)), self.bias
        return plain


def _replace_linears(model: GPT, wanted: Callable, new: Callable) -> None:
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            for name, layer in [*part.named_children()]:
                if wanted(name, layer):
                    setattr(part, name, new(layer))


def add_lora(model: GPT, rank: int, alpha: float, dropout: float, targets: str) -> None:
    """ freeze the model and give the layers named in targets, such as 'c_attn,c_fc', a trained low-rank part """
    names = [name.strip() for name in targets.split(',')]
    if not (1 <= rank <= model.config.n_embd and alpha > 0 and 0 <= dropout < 1 and len({*names}) == len(names)
            and {*names} <= {'c_attn', 'c_proj', 'c_fc'}):
        raise ValueError(f"lora_rank={rank} must be 1 to n_embd={model.config.n_embd}, lora_alpha={alpha} above 0, "
                         f"lora_dropout={dropout} at least 0 and below 1, lora_targets={targets} some of "
                         "c_attn,c_proj,c_fc")
    model.requires_grad_(False)
    _replace_linears(model, lambda name, layer: name in names, lambda layer: LoRALinear(layer, rank, alpha, dropout))


@torch.no_grad()
def merge_lora(model: GPT) -> None:
    """ fold the low-rank parts into the weights, which are new tensors then, and make all of them trainable """
    _replace_linears(model, lambda name, layer: isinstance(layer, LoRALinear), LoRALinear.merged)
    model.requires_grad_(True)


def fingerprint(weights: dict[str, Tensor]) -> str:
    """ SHA-256 of names, shapes, types and values: which weights a low-rank part belongs to """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f'{name} {tuple(tensor.shape)} {tensor.dtype} '.encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def lora_weights(model: GPT) -> dict[str, Tensor]:
    """ the low-rank parts of a state dict: all that is trained and all that a checkpoint of an adapter holds """
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if '.lora_' in name}
