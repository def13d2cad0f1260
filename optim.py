""" What of a model is trained when, Muon, one update, and the state of the optimizer.

    stages = unfreezing('head:1000,all', n_layer=12)   # [(0, 13), (1000, 0)]
    train_only(model, frozen_at(stages, iter_num))
    load_optimizer(optimizer, checkpoint['optimizer'])
"""
import math
import os

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from common import fail, one_line_errors, resolve_dtype
from model import FUSED, GPT, add_lora, fingerprint

# ---- gradual unfreezing (https://arxiv.org/abs/1801.06146)

def unfreezing(text: str, n_layer: int) -> list[tuple[int, int]]:
    """ (iteration from which, parts that are frozen then) of each stage of 'head:1000,3:1000,all'

    The parts are the embeddings and the blocks, in their order. A stage is head (with the last norm), the last k blocks
    and the head, or all, and says for how many iterations, the last one for the rest of them. ValueError says why not.
    """
    frozen_parts = {'head': n_layer + 1, **{str(k): n_layer + 1 - k for k in range(1, n_layer + 1)}, 'all': 0}
    stages, begin, words = [], 0, text.split(',') if text else []
    for i, word in enumerate(words):
        name, _, number = word.strip().partition(':')
        last = i == len(words) - 1
        if name not in frozen_parts or not (number.isdecimal() or last and not number):
            raise ValueError(f"unfreeze={text}: '{word}' is not head, 1 to {n_layer} (the last blocks) or all, "
                             "with :ITERATIONS behind each but the last")
        stages.append((begin, frozen_parts[name]))
        begin += int(number or 0)
    return stages


def frozen_at(stages: list[tuple[int, int]], iter_num: int) -> int:
    """ how many parts are frozen at an iteration """
    return next((frozen for begin, frozen in reversed(stages) if begin <= iter_num), 0)


def train_only(model: GPT, frozen: int) -> str:
    """ freeze the embeddings and blocks before this part: no gradient, and none of the memory for it; says what trains

    A head that is tied to the token embedding is one matrix with it. It is trained for what it does as the head; no
    gradient reaches it as the embedding, through the frozen parts.
    """
    model.frozen = frozen
    tied = ['wte'] * model.config.tie
    for name in {'wpe', 'wte'} & {*model.transformer} - {*tied}:
        model.transformer[name].requires_grad_(frozen == 0)
    for i, block in enumerate(model.transformer.h, 1):
        block.requires_grad_(i >= frozen)
    if not frozen:
        return "all"
    blocks = model.config.n_layer + 1 - frozen
    return ("the head" + f" and the last {blocks} blocks" * (blocks > 0)
            + "; the token embedding is the same matrix and changes with it" * model.config.tie)


# ---- LoRA

def start_adapter(model: GPT, start: dict, config: dict) -> dict:
    """ add_lora to the weights that a run starts from, as its config says; what an adapter's checkpoint says of itself

    It names its base by its absolute path, where it is a file or folder, and as the user did.
    """
    lora = {key: config[f'lora_{key}'] for key in ('rank', 'alpha', 'dropout', 'targets')}
    if not start:
        fail("--lora_rank wants weights to start from: --init_from=gpt2, ckpt:PATH or a folder with a GPT-2")
    given, path = config['init_from'], start.get('path', config['init_from'])
    prefix = 'ckpt:' if 'path' in start else ''
    if prefix and os.path.abspath(os.path.dirname(path)) == os.path.abspath(config['out_dir']):
        fail(f"--out_dir={config['out_dir']} holds the weights that the adapter is for; choose another --out_dir")
    found = [prefix + os.path.abspath(path)] if os.path.exists(path) else []
    base = {'sources': [*found, given], 'sha256': fingerprint(model.state_dict())}
    with one_line_errors():
        add_lora(model, **lora)
    return {'lora': lora, 'base': base}


# ---- Muon, https://kellerjordan.github.io/posts/muon

def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """ matrices (n, rows, columns) with all singular values moved to about 1, by Newton-Schulz iterations

    Five bring those from 0.002 of the matrix's norm on to between 0.68 and 1.21; smaller ones grow up to 485 times.
    """
    a, b, c = 3.4445, -4.7750, 2.0315   # the published ones: a is as steep as the rest allows
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices   # so the squares are small
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):              # to a x + b (x x') x + c (x x') (x x') x
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if x.shape == matrices.shape else x.mT


class Muon(torch.optim.AdamW):
    """ AdamW, and for the last group Muon: its momentum, orthogonalized, all matrices of a shape in one product

    That is in bfloat16 where the hardware has it, else in float32: torch.optim.Muon, always in bfloat16, is slow there.
    Of several processes each keeps the momentum of its share of the matrices and computes their steps, which all apply.
    All must call state_dict, because rank 0 gathers the momenta.
    """

    def __init__(self, groups: list[dict], **options):
        super().__init__(groups, **options)
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.stacks = {}   # matrices by shape; the i-th of each is rank i % world_size's
        for p in self.param_groups[-1]['params']:
            self.stacks.setdefault(p.shape, []).append(p)
        for stack in self.stacks.values():
            for p in stack[self.rank::self.world_size]:
                self.state[p].update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p))   # AdamW wants a step
        auto = resolve_dtype('auto', p.device.type)
        self.dtype = auto if auto == torch.bfloat16 else torch.float32

    @torch.no_grad()
    def step(self) -> None:
        """ one update; none where found_inf is set, as in the fused AdamW """
        *others, group = everything = self.param_groups
        self.param_groups = others
        super().step()
        self.param_groups = everything
        bad = getattr(self, 'found_inf', torch.zeros(()))
        for (rows, columns), stack in self.stacks.items():
            steps = self._steps(stack, group['momentum'], bad)
            rate = group['lr'] * (1 - bad)
            torch._foreach_mul_(stack, 1 - rate * group['weight_decay'])
            torch._foreach_sub_(stack, list(steps * (rate * max(1, rows / columns) ** 0.5)))

    def _steps(self, stack: list[Tensor], momentum: float, bad: Tensor) -> Tensor:
        """ (n, rows, columns) of all n in stack, from the gradients that were added to the momenta, unless bad """
        mine = stack[self.rank::self.world_size]
        steps = stack[0].new_zeros(-(-len(stack) // self.world_size), *stack[0].shape, dtype=self.dtype)
        if mine:
            momenta = [self.state[p]['momentum_buffer'] for p in mine]
            average = torch.stack(momenta)
            gradient = torch.stack([p.grad for p in mine]).where(bad == 0, average)
            torch._foreach_copy_(momenta, list(average.lerp_(gradient, 1 - momentum)))
            steps[:len(mine)] = orthogonalized(gradient.lerp_(average, momentum).to(self.dtype))   # Nesterov's
        if self.world_size > 1:
            everyones = [torch.empty_like(steps) for _ in range(self.world_size)]
            dist.all_gather(everyones, steps)
            steps = torch.stack(everyones, dim=1).flatten(0, 1)
        return steps[:len(stack)].float()

    def state_dict(self) -> dict:
        """ on rank 0 with all momenta, on the others with their own """
        for stack in self.stacks.values() if self.world_size > 1 else ():
            for i, p in enumerate(stack):
                owner = i % self.world_size
                momentum = self.state[p]['momentum_buffer'] if owner == self.rank else torch.empty_like(p)
                dist.broadcast(momentum, owner)
                if self.rank == 0 < owner:   # on the host, in the same memory each time
                    if not self.state[p]:
                        self.state[p].update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p, device='cpu'))
                    self.state[p]['momentum_buffer'].copy_(momentum)
        return super().state_dict()

    def load_state_dict(self, state: dict) -> None:
        """ a whole one; each process keeps its own """
        super().load_state_dict(state)
        for stack in self.stacks.values():
            for i, p in enumerate(stack):
                if i % self.world_size != self.rank:
                    self.state.pop(p, None)


# ---- an update

def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """ the learning rate; Muon's is in proportion to it """
    for group in optimizer.param_groups:
        group['lr'] = lr * group.get('lr_scale', 1)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, loss: Tensor,
           grad_clip: float) -> tuple[Tensor, Tensor]:
    """ one step with the gradients that there are, which then go; (norm, bad), both on the device

    norm: of all gradients, before they were clipped to grad_clip (0: they are not). bad: 1.0 where the loss or a
    gradient of any process is not finite, and then nothing is changed, else 0.0. The fused kernels look at it by
    themselves; nothing waits for the device, except in float16, with FSDP and on MPS.
    """
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    sharded = hasattr(norm, 'full_tensor')
    norm = norm.full_tensor() if sharded else norm
    bad = 1 - (loss.detach() + norm).isfinite().float()
    if dist.is_initialized():
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    if scaler.is_enabled() or sharded or bad.device.type not in FUSED:
        if not bad.item():
            scaler.step(optimizer)
    else:
        optimizer.grad_scale, optimizer.found_inf = None, bad   # what GradScaler gives them
        optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm, bad


# ---- the optimizer's state

def _fit(moment: Tensor, parameter: Tensor) -> Tensor:
    """ a moment as its parameter is now: cut to a shortened position table, and sharded among the processes """
    if not isinstance(moment, Tensor) or not moment.dim():
        return moment   # the number of steps
    moment = moment[:len(parameter)]
    if moment.shape != parameter.shape:
        raise ValueError(f"a moment has shape {tuple(moment.shape)}, its parameter {tuple(parameter.shape)}")
    if hasattr(parameter, 'full_tensor'):   # FSDP's
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(moment.to(parameter.device), parameter.device_mesh, parameter.placements)
    return moment


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """ take over the moments; the settings (rates, decay, fused) stay those of this run, not the checkpoint's """
    try:
        if len(state['param_groups']) != len(optimizer.param_groups):
            raise ValueError("it is that of another --optimizer")
        # before loading, because fused decides on which device the step counts are kept
        groups = [{**saved, **own, 'params': saved['params']}
                  for saved, own in zip(state['param_groups'], optimizer.param_groups, strict=True)]
        numbers = [i for group in groups for i in group['params']]
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        moments = {i: {key: _fit(moment, p) for key, moment in state['state'][i].items()}
                   for i, p in zip(numbers, parameters, strict=True) if i in state['state']}
        optimizer.load_state_dict({'state': moments, 'param_groups': groups})
    except (ValueError, KeyError) as error:
        fail(f"the checkpoint has no optimizer state that fits this model ({error}); "
             "--init_from=ckpt:PATH takes its weights alone")
