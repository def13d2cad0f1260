""" Muon: its iterations against singular values, its steps against PyTorch's, one process against two; schedules. """
import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import TINY, equal, records, tensors

from checkpoint import load
from dataset import CharTokenizer, write_dataset
from model import GPT, GPTConfig
from optim import Muon, orthogonalized, set_rate, update

COUNT = """
import optim, torch
optim.resolve_dtype = lambda *device: torch.float32
step = optim.Muon.step
def counting(self):
    momenta = [state['momentum_buffer'] for state in self.state.values() if 'momentum_buffer' in state]
    before = [momentum.clone() for momentum in momenta]
    step(self)
    moved = sum(not momentum.equal(old) for momentum, old in zip(momenta, before))
    print(f'rank {self.rank} steps {moved}\\n', end='', flush=True)
optim.Muon.step = counting
"""
MUON = ['--optimizer=muon', '--muon_lr=0.02', '--weight_decay=0.1']


def small(**switches):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=3, n_head=2, n_embd=16, **switches))


def with_gradients(model, seed=0):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def optimizer_of(model, **options):
    return model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', **{'muon_lr': 0.02, **options})


# ---- Newton-Schulz

def polynomial(x, steps=5):
    """ what becomes of a singular value, in float64 """
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


def test_the_band_that_is_documented():
    """ of a singular value that is at least 0.002 of the norm: 0.68 to 1.21; below, less than 485 times as large """
    x = torch.logspace(math.log10(0.002), 0, 10**5, dtype=torch.float64)
    assert 0.68 < polynomial(x).min() < 0.69 and 1.20 < polynomial(x).max() < 1.21
    x = torch.logspace(-6, math.log10(0.002), 10**4, dtype=torch.float64)
    assert (polynomial(x) / x).max() < 485


@pytest.mark.parametrize('shape', [(64, 64), (96, 32), (32, 96), (1, 7), (384, 128)])
def test_singular_values_come_into_the_band_and_vectors_stay(shape):
    """ U f(S) V' of each matrix in the batch, whatever its scale """
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    U, S, V = torch.linalg.svd(matrices.double(), full_matrices=False)
    relative = S / S.norm(dim=-1, keepdim=True)
    got = orthogonalized(matrices)
    assert (got - U @ torch.diag_embed(polynomial(relative)) @ V).abs().max() < 1e-3
    values = torch.linalg.svdvals(got)[relative > 0.002]
    assert len(values) > 0.9 * S.numel() and values.min() > 0.68 and values.max() < 1.21


def test_in_bfloat16_they_stay_near_the_band():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(2, 32, 96).bfloat16()).float())
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonalized(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))


# ---- steps

def test_matrices_in_blocks_are_muons_and_the_rest_is_adamws():
    model = small()
    others, vectors, matrices = optimizer_of(model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split('.', 3)[-1] for p in matrices['params']} == {
        'attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight'}
    assert len(matrices['params']) == 4 * 3
    assert {names[id(p)] for p in others['params']} == {'transformer.wte.weight', 'transformer.wpe.weight'}
    assert all(p.dim() == 1 for p in vectors['params']) and vectors['weight_decay'] == 0
    assert type(optimizer_of(model, muon_lr=0.0)) is torch.optim.AdamW


def test_steps_are_pytorchs():
    """ of torch.optim.Muon, which rounds to bfloat16, and for the rest of AdamW to the bit """
    ours, theirs = small(), small()
    optimizer = optimizer_of(ours)
    optimizer.dtype = torch.float32
    inside = [p for p in theirs.transformer.h.parameters() if p.dim() == 2]
    muon = torch.optim.Muon(inside, lr=0.02, weight_decay=0.1, momentum=0.95)
    adamw = optimizer_of(theirs, muon_lr=0.0)
    for group in adamw.param_groups:
        group['params'] = [p for p in group['params'] if not any(p is each for each in inside)]
    before = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    for seed in range(3):
        for model, optimizers in ((ours, [optimizer]), (theirs, [muon, adamw])):
            with_gradients(model, seed)
            for each in optimizers:
                each.step()
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        moved = (two - before[name]).norm()
        assert moved > 0 and (one - two).norm() <= (0.02 * moved if any(two is each for each in inside) else 0)


def test_a_step_of_any_gradient_is_as_long():
    """ a matrix moves by muon_lr times about 1 along each singular direction, and more where there are more rows """
    model = small()
    optimizer, before = optimizer_of(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    with_gradients(model)
    for i, p in enumerate(model.parameters()):
        p.grad *= 10.0 ** (i % 9 - 4)
    for group in optimizer.param_groups:
        group['weight_decay'] = 0.0
    set_rate(optimizer, 1e-3)
    optimizer.step()
    for name, p in model.transformer.h.named_parameters():
        if p.dim() == 2:
            values = torch.linalg.svdvals(p - before[f'transformer.h.{name}']) / 0.02
            factor = math.sqrt(max(1, p.shape[0] / p.shape[1]))
            assert 0.6 * factor < values.median() and values.max() < 1.25 * factor


def test_a_bad_update_changes_nothing():
    """ neither weights nor momenta nor Adam's moments, and the next good one is as if it had not been """
    states = []
    for seeds in ((1, 2), (1, None, 2)):
        model = small()
        optimizer = optimizer_of(model)
        for seed in seeds:
            with_gradients(model, seed or 0)
            if seed is None:
                model.transformer.h[1].mlp.c_fc.weight.grad[0, 0] = math.nan
            bad = update(model, optimizer, torch.amp.GradScaler(enabled=False), torch.zeros(()), 1.0)[1]
            assert bad == (seed is None)
        moments = [tensor for each in optimizer.state_dict()['state'].values() for tensor in each.values()]
        states.append([*model.state_dict().values(), *moments])
    assert all(torch.equal(one, two) for one, two in zip(*states, strict=True))


def test_rates_keep_their_proportion():
    optimizer = optimizer_of(small())
    set_rate(optimizer, 5e-4)
    assert [group['lr'] for group in optimizer.param_groups] == [5e-4, 5e-4, pytest.approx(0.01)]


# ---- in the scripts

def test_resuming_is_exact(tiny, script):
    script('train.py', *TINY, *MUON, '--out_dir=straight')
    script('train.py', *TINY, *MUON, '--max_iters=3')
    script('train.py', *TINY, *MUON, '--init_from=resume')
    assert equal(tensors('out/ckpt.pt'), tensors('straight/ckpt.pt'))
    script('train.py', *TINY, '--out_dir=adamw')
    assert not equal(load('adamw/ckpt.pt')['model'], load('straight/ckpt.pt')['model'])


@pytest.mark.slow
@pytest.mark.parametrize('world_size', [2, 3])
def test_processes_are_one(tiny, script, processes, world_size, monkeypatch):
    """ weights and gathered momenta; each process has its share of them only; 3 do not divide the 2 of each shape """
    monkeypatch.setattr('optim.resolve_dtype', lambda *device: torch.float32)   # bfloat16 would round by more
    options = [*TINY, *MUON, '--gradient_accumulation_steps=6', '--n_layer=2']
    script('train.py', *options, '--out_dir=one')
    for more in ('--max_iters=3', '--init_from=resume'):   # it goes on from its own checkpoint
        run = processes(world_size, 'train.py', *options, '--out_dir=several', more, patch=COUNT)
        assert run.wait() == [0] * world_size, run.text()
        for rank in range(world_size):
            assert run.text().count(f'rank {rank} steps {4 * len(range(2)[rank::world_size])}\n') == 3
    one, several = tensors('one/ckpt.pt'), tensors('several/ckpt.pt')
    assert one.keys() == several.keys() and sum('momentum_buffer' in name for name in one) == 8
    assert max((one[name] - several[name]).abs().max() for name in one) < 2e-5
    script('train.py', *options, '--out_dir=several', '--init_from=resume', '--max_iters=7')   # one takes over


@pytest.mark.slow
def test_processes_are_nearly_one_in_bfloat16(tiny, script, processes, monkeypatch):
    monkeypatch.setattr('optim.resolve_dtype', lambda *device: torch.bfloat16)
    options = [*TINY, *MUON, '--gradient_accumulation_steps=2']
    script('train.py', *options, '--out_dir=one')
    run = processes(2, 'train.py', *options, '--out_dir=two', patch=COUNT.replace('float32', 'bfloat16'))
    assert run.wait() == [0, 0], run.text()
    one, two = load('one/ckpt.pt')['model'], load('two/ckpt.pt')['model']
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 2e-3


def test_float16(tiny, script):
    """ with a gradient scaler """
    state = script('train.py', *TINY, *MUON, '--dtype=float16', '--max_iters=3')
    assert isinstance(state['optimizer'], Muon) and state['iter_num'] == 3
    assert all(record['loss'] < 3 for record in records('loss'))


@pytest.mark.parametrize('arguments, words', [
    (['--optimizer=sgd'], '--optimizer=sgd is neither adamw nor muon'),
    (['--schedule=step'], '--schedule=step is neither cosine nor linear'), (['--cooldown=0'], '--cooldown=0.0 must be'),
    (['--cooldown=1.5'], '--cooldown=1.5'), ([*MUON, '--parallel=fsdp'], 'not go with --parallel=fsdp'),
    ([*MUON, '--unfreeze=head:2,all'], 'not go with --unfreeze'), ([*MUON, '--muon_lr=0'], 'with a --muon_lr of 0'),
    ([*MUON, '--learning_rate=0'], 'with a --learning_rate of 0'), ([*MUON, '--muon_lr=-1'], '--muon_lr=-1.0 must')])
def test_refused(tiny, fails, arguments, words):
    assert words in fails('train.py', *TINY, *arguments)[1] and not os.path.exists('out')


def test_lora_and_another_optimizers_state_are_refused(tiny, script, fails):
    script('train.py', *TINY, '--out_dir=base')
    line = fails('train.py', *TINY, *MUON, '--init_from=ckpt:base/ckpt.pt', '--lora_rank=2')[1]
    assert '--optimizer=muon does not go with LoRA' in line
    line = fails('train.py', *TINY, *MUON, '--init_from=resume', '--out_dir=base', '--max_iters=9')[1]
    assert 'no optimizer state that fits' in line and 'another --optimizer' in line
    assert '--init_from=ckpt:PATH takes its weights alone' in line


def test_export_leaves_its_state_out_for_nanogpt(tiny, script, capsys):
    """ which knows two groups of parameters and no third """
    script('train.py', *TINY, *MUON)
    script('export.py', '--out_dir=out', '--ckpt=last', '--to=nanogpt', '--path=plain.pt')
    assert 'optimizer' not in load('plain.pt') and 'no optimizer in it' in capsys.readouterr().out


def test_the_range_test_keeps_the_proportion(tiny, script):
    write_dataset('data/tiny', CharTokenizer('\nabcdefgh'), {'train': np.arange(2000) % 9, 'val': np.arange(300) % 9})
    state = script('lr_find.py', *TINY, *MUON, '--num_steps=30', '--first_lr=1e-4')
    *_, group = state['optimizer'].param_groups
    assert group['lr'] == pytest.approx(state['rates'][-1] * 0.02 / 1e-2)
    assert json.load(open('out/lr_find.json'))['config']['optimizer'] == 'muon'


# ---- the linear schedule

def test_linear_schedule(tiny, script):
    """ warm-up as ever, then constant, then to 0 at lr_decay_iters, and there it stays; min_lr is the cosine's """
    get_lr = script('train.py', *TINY, '--schedule=linear', '--cooldown=0.4', '--learning_rate=1e-2',
                    '--warmup_iters=4', '--min_lr=1e-3', '--max_iters=1')['get_lr']
    assert [get_lr(it) for it in range(4)] == pytest.approx([1e-2 * (it + 1) / 5 for it in range(4)])
    assert get_lr(4) == get_lr(60) == 1e-2 and get_lr(80) == pytest.approx(5e-3) and get_lr(99) == pytest.approx(2.5e-4)
    assert get_lr(100) == get_lr(500) == 0


def test_linear_schedule_when_the_warm_up_ends_late(tiny, script, capsys):
    """ it falls from there, without a jump; and where nothing is left, it is 0 """
    options = [*TINY, '--schedule=linear', '--learning_rate=1e-2', '--max_iters=0']
    get_lr = script('train.py', *options, '--warmup_iters=80', '--lr_decay_iters=100')['get_lr']
    assert get_lr(80) == 1e-2 and get_lr(90) == pytest.approx(5e-3) and get_lr(100) == 0
    capsys.readouterr()
    assert script('train.py', *options, '--warmup_iters=0', '--lr_decay_iters=0')['get_lr'](0) == 0
    assert 'at its lowest right after the warm-up' in capsys.readouterr().out
