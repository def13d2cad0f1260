""" What of a model is trained when, one update of it, and the state of its optimizer.

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

from common import fail, one_line_errors
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
    embeddings = [model.transformer.wpe] + [model.transformer.wte] * (not model.config.tie)
    for part in embeddings:
        part.requires_grad_(frozen == 0)
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


# ---- an update

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
