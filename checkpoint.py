""" Checkpoints: written whole or not at all, verified before they are believed, plain types and tensors only.

out_dir/ckpt.pt is the latest state, out_dir/ckpt_best.pt the weights with the lowest validation loss. The keys are
nanoGPT's (model, optimizer, model_args, iter_num, best_val_loss, config) and some more beside them.
"""
import dataclasses
import os
import pickle
import platform
import shutil
import zipfile
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from common import atomic_write, fail, first_line, print0
from model import GPT, GPTConfig

LATEST, BEST = 'ckpt.pt', 'ckpt_best.pt'
NANOGPT_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')


# ---- saving

def model_args(config: GPTConfig) -> dict:
    """ the fields that rebuild the model; those that nanoGPT does not know only where they are not at their default """
    defaults = GPTConfig()
    return {key: value for key, value in dataclasses.asdict(config).items()
            if key in NANOGPT_ARGS or value != getattr(defaults, key)}


def versions() -> dict:
    """ what the numbers in a checkpoint were made with """
    return {'python': platform.python_version(), 'torch': str(torch.__version__), 'numpy': np.__version__}


def _tensors(state) -> Iterator[Tensor]:
    """ every tensor in nested dicts, lists and tuples """
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)


def save(path: str, state: dict) -> bool:
    """ write state to path; False, with one line that says why and path as it was, if that cannot be done

    Refused are non-finite weights; expected are full disks. Training goes on after either.
    """
    try:
        if not all(torch.isfinite(tensor).all() for tensor in state['model'].values()):
            raise OSError("a weight is not finite")
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        size = sum({t.data_ptr(): t.nbytes for t in _tensors(state)}.values())   # tied weights are stored once
        if (free := shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free) < size:
            raise OSError(f"{size / 1e6:,.0f} MB to write and {free / 1e6:,.0f} MB free")
        with atomic_write(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:   # torch reports a failed write as either
        print0(f"warning: {path} was not saved ({first_line(error)}); what stood there before still does")
        return False
    return True


def move_aside(out_dir: str) -> None:
    """ move an earlier run's files to out_dir/old-N, so that a new run overwrites nothing """
    names = [name for name in (LATEST, BEST, 'log.jsonl') if os.path.exists(os.path.join(out_dir, name))]
    if not names:
        return
    number = next(n for n in range(1, 10**6) if not os.path.exists(os.path.join(out_dir, f'old-{n}')))
    aside = os.path.join(out_dir, f'old-{number}')
    os.makedirs(aside)
    for name in names:
        os.replace(os.path.join(out_dir, name), os.path.join(aside, name))
    print0(f"{out_dir} held another run: moved {', '.join(names)} to {aside}")


# ---- loading

def find(out_dir: str, ckpt: str = 'last') -> str:
    """ path of the 'last' or the 'best' checkpoint in out_dir, the last where there is no best; SystemExit if none """
    if ckpt not in ('best', 'last'):
        fail(f"--ckpt={ckpt} is neither best nor last")
    for name in (BEST, LATEST) if ckpt == 'best' else (LATEST,):
        if os.path.exists(path := os.path.join(out_dir, name)):
            return path
    others = sorted(name for name in os.listdir() if os.path.exists(os.path.join(name, LATEST)))
    advice = f"--out_dir={others[0]} has one" if others else f"train one: python train.py CONFIG --out_dir={out_dir}"
    fail(f"no checkpoint in '{out_dir}'; {advice}")


def load(path: str) -> dict:
    """ the checkpoint at path, on the CPU, its weights named as GPT's; SystemExit if it is damaged or not one

    The file's CRCs are verified, and nothing in it is run.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                fail(f"{path} is damaged at {damaged}; go back to another checkpoint")
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        fail(f"{path} holds more than tensors and plain values; loading it could run code, so it was not loaded")
    except (OSError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
        fail(f"{path} is damaged or not a checkpoint ({first_line(error)})")
    parts = [checkpoint.get(key) for key in ('model', 'model_args')] if isinstance(checkpoint, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        fail(f"{path} is not a GPT checkpoint: it has no model and model_args")
    # torch.compile and DDP wrappers prefix the names, and before PyTorch 2.0 nanoGPT stored its causal masks too
    checkpoint['model'] = {name.removeprefix('module.').removeprefix('_orig_mod.'): tensor
                           for name, tensor in checkpoint['model'].items() if not name.endswith('.attn.bias')}
    return checkpoint


def build_model(checkpoint: dict, **changes) -> GPT:
    """ the model of a loaded checkpoint, which gives its tensors away; changes override fields such as dropout """
    try:
        config = GPTConfig(**{**checkpoint['model_args'], **changes})
        with torch.device('meta'):   # no memory and no random numbers for weights that are replaced at once
            model = GPT(config)
        model.load_state_dict(checkpoint['model'], assign=True)
    except (TypeError, ValueError, RuntimeError) as error:   # unknown field, impossible value, other tensors
        fail(f"the checkpoint's model is not one of ours: {' '.join(str(error).split())[:300]}")
    model.transformer.wte.weight = model.lm_head.weight   # assigned one by one, so tie them again
    return model


def crop(checkpoint: dict, block_size: int) -> None:
    """ shorten the position table of a loaded checkpoint, and its optimizer moments with it """
    checkpoint['model_args']['block_size'] = block_size
    name = 'transformer.wpe.weight'
    checkpoint['model'][name] = checkpoint['model'][name][:block_size].clone()
    moments = checkpoint.get('optimizer', {}).get('state', {}).get(1, {})   # wpe is the second tensor, after wte
    for key in ('exp_avg', 'exp_avg_sq'):
        if key in moments:
            moments[key] = moments[key][:block_size].clone()


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """ take over the moments; the settings (rates, decay, fused) stay those of this run, not the checkpoint's """
    settings = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
    try:
        # before loading, because fused decides on which device the step counts are kept
        groups = [{**saved, **own} for saved, own in zip(state['param_groups'], settings, strict=True)]
        optimizer.load_state_dict({**state, 'param_groups': groups})
    except (ValueError, KeyError) as error:
        fail(f"the checkpoint's optimizer state does not fit this model ({error}); it has weights only, or is damaged")


def check_resume(checkpoint: dict, config: dict, data: dict) -> None:
    """ print what this run sets differently; SystemExit if data, {'tokenizer': ..., 'sha256': ...}, is other data """
    before = checkpoint.get('config', {})
    for key in sorted(before.keys() & config.keys() - {'init_from', 'out_dir', 'eval_only'}):
        if before[key] != config[key]:
            print0(f"resume: {key} was {before[key]!r}, is {config[key]!r}")
    for key, now in data.items():
        if (was := checkpoint.get(key)) and now and was != now:
            fail(f"--init_from=resume goes on with the same data, but its {key} was {was} and is {now}; "
                 "for other data start with another --out_dir")
