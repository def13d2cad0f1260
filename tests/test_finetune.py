""" LoRA, gradual unfreezing, the learning-rate range test and export; transformers and peft are the oracles. """
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, equal, records, tensors
from transformers import GPT2LMHeadModel

from checkpoint import build_model, load, weights_of
from dataset import BPETokenizer, CharTokenizer, write_dataset
from model import GPT, GPTConfig, LoRALinear, add_lora, empty_model, fingerprint, lora_weights, merge_lora
from optim import frozen_at, train_only, unfreezing

LORA = ['--init_from=ckpt:base', '--lora_rank=2', '--lora_alpha=8', '--out_dir=out']


def tiny_model(seed=0, **options):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(block_size=16, vocab_size=11, n_layer=3, n_head=2, n_embd=16), **options}))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def base(tiny, script):
    """ data/tiny, and base/ with a trained model """
    script('train.py', *TINY, '--out_dir=base', '--bias=True')
    return tiny


# ---- LoRA

def test_the_number_of_parameters_of_gpt2():
    """ 12 layers * (768 * 8 + 8 * 2304) """
    model = empty_model(GPTConfig(vocab_size=50257))
    with torch.device('meta'):
        add_lora(model, 8, 16, 0.0, 'c_attn')
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 294_912
    assert sum(p.numel() for p in lora_weights(model).values()) == 294_912


@pytest.mark.parametrize('targets, layers', [('c_attn', 3), ('c_proj', 6), ('c_fc', 3), ('c_attn, c_proj,c_fc', 12)])
def test_it_begins_as_its_base_whose_weights_it_shares(targets, layers):
    model, idx = tiny_model(), torch.randint(11, (2, 16))
    before, weights = model(idx, idx), {id(p) for p in model.parameters()}
    add_lora(model, 4, 8, 0.5, targets)
    model.eval()
    after = model(idx, idx)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert weights == {id(p) for p in model.parameters() if not p.requires_grad}
    assert len(lora_weights(model)) == 2 * layers == sum(p.requires_grad for p in model.parameters())
    names = [name for name in model.state_dict() if '.lora_' not in name]
    assert names == [*tiny_model().state_dict()]


@pytest.mark.parametrize('bias', [True, False])
def test_merged_is_what_it_was(bias):
    model, idx = tiny_model(bias=bias), torch.randint(11, (2, 16))
    original = {name: p.clone() for name, p in model.state_dict().items()}
    add_lora(model, 4, 8, 0.5, 'c_attn,c_proj,c_fc')
    for tensor in lora_weights(model).values():
        torch.nn.init.normal_(tensor, std=0.2)
    model.eval()
    A, B = (model.transformer.h[0].attn.c_attn.get_parameter(f'lora_{name}') for name in 'AB')
    expected = original['transformer.h.0.attn.c_attn.weight'] + 8 / 4 * B @ A   # the paper's equation 3
    logits, base = model(idx, idx)[0], model.transformer.h[0].attn.c_attn.weight
    merge_lora(model)
    assert torch.allclose(model(idx, idx)[0], logits, atol=1e-5)
    assert torch.allclose(model.transformer.h[0].attn.c_attn.weight, expected, atol=1e-6)
    assert torch.equal(base, original['transformer.h.0.attn.c_attn.weight'])   # the shared weights stay
    assert all(p.requires_grad for p in model.parameters()) and not lora_weights(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_dropout_is_in_the_low_rank_part_only():
    model, idx = tiny_model(), torch.randint(11, (2, 16))
    add_lora(model, 4, 8, 0.5, 'c_attn')
    assert torch.equal(model(idx, idx)[0], model(idx, idx)[0])   # B is 0
    for tensor in lora_weights(model).values():
        torch.nn.init.normal_(tensor)
    assert not torch.equal(model(idx, idx)[0], model(idx, idx)[0])


@pytest.mark.parametrize('options', [
    (0, 8, 0.0, 'c_attn'), (4, 8, 1.0, 'c_attn'), (4, 8, 0.0, 'wte'), (4, 8, 0.0, ''), (17, 8, 0.0, 'c_attn'),
    (4, 0.0, 0.0, 'c_attn'), (4, -8, 0.0, 'c_attn'), (4, 8, 0.0, 'c_attn,c_attn')])
def test_impossible_adapters(options):
    with pytest.raises(ValueError, match=f'lora_rank={options[0]} must be.*lora_targets={options[3]} '):
        add_lora(tiny_model(), *options)


def test_an_adapter_trains_alone_and_its_checkpoint_holds_it_alone(base, script, capsys):
    frozen = fingerprint(load('base/ckpt_best.pt')['model'])
    capsys.readouterr()
    state = script('train.py', *TINY, *LORA, '--max_iters=10', '--block_size=7')
    assert "of which LoRA's 256 are trained" in capsys.readouterr().out   # 2 * 2 * (16 + 3 * 16)
    trained, best = load('out/ckpt.pt'), load('out/ckpt_best.pt')
    for checkpoint in (trained, best):
        assert checkpoint['model'].keys() == lora_weights(state['raw_model']).keys()
        assert checkpoint['lora'] == dict(rank=2, alpha=8.0, dropout=0.0, targets='c_attn')
        where = 'ckpt:' + os.path.abspath('base/ckpt_best.pt')
        assert checkpoint['base'] == {'sources': [where, 'ckpt:base'], 'sha256': frozen}
    assert len(trained['optimizer']['state']) == len(trained['model']) and 'optimizer' not in best
    assert all(tensor.any() for tensor in trained['model'].values())
    weights = state['raw_model'].state_dict()
    assert all(torch.equal(tensor[:7] if 'wpe' in name else tensor, weights[name])
               for name, tensor in load('base/ckpt_best.pt')['model'].items())
    losses = [record['loss'] for record in records('loss')]
    assert losses[0] == pytest.approx(records('val_loss', 'base/log.jsonl')[-1]['train_loss'], abs=0.2)


def test_sizes_of_checkpoints(here, script):
    """ the shape of GPT-2, with a smaller vocabulary so that the full checkpoint is not larger than it must be """
    torch.manual_seed(0)
    os.makedirs('data/tiny')
    write_dataset('data/tiny', CharTokenizer('ab'), {'train': np.arange(300) % 2, 'val': np.arange(99) % 2})
    model = GPT(GPTConfig(vocab_size=2, n_layer=2, n_embd=768, n_head=12, block_size=8))
    os.makedirs('base')
    torch.save({'model': model.state_dict(), 'model_args': model.config.model_args()}, 'base/ckpt.pt')
    script('train.py', *TINY, '--init_from=ckpt:base', '--out_dir=full', '--max_iters=1')
    script('train.py', *TINY, '--init_from=ckpt:base', '--out_dir=lora', '--max_iters=1', '--lora_rank=8')
    for name, most in (('ckpt_best.pt', 0.02), ('ckpt.pt', 0.06)):
        assert os.path.getsize(f'lora/{name}') < most * os.path.getsize(f'full/{name}')


def test_an_adapter_resumed_is_the_one_that_ran_through(base, script):
    options = [*TINY, *LORA, '--lora_dropout=0.2', '--lora_targets=c_attn,c_fc']
    script('train.py', *options, '--max_iters=9', '--out_dir=through')
    script('train.py', *options, '--max_iters=5')
    script('train.py', *options, '--init_from=resume', '--max_iters=9')
    assert equal(tensors('through/ckpt.pt'), tensors('out/ckpt.pt'))
    assert load('out/ckpt.pt')['base'] == load('through/ckpt.pt')['base']


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_an_adapter_on_two_processes(base, script, processes, parallel):
    options = [*TINY, *LORA, '--max_iters=5', '--lora_targets=c_attn,c_proj']
    script('train.py', *options, '--out_dir=one')
    run = processes(2, 'train.py', *options, '--out_dir=two', f'--parallel={parallel}')
    assert run.wait() == [0, 0], run.text()
    one, two = tensors('one/ckpt.pt'), tensors('two/ckpt.pt')
    assert one.keys() == two.keys() and all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)


def test_the_settings_of_an_adapter_stay(base, script, capsys):
    script('train.py', *TINY, *LORA, '--max_iters=2')
    capsys.readouterr()
    script('train.py', *TINY, '--init_from=resume', '--max_iters=3', '--lora_rank=4', '--lora_targets=c_fc')
    out = capsys.readouterr().out
    assert 'lora_rank stays 2, not 4' in out and "lora_targets stays 'c_attn', not 'c_fc'" in out
    assert load('out/ckpt.pt')['lora']['rank'] == 2


def test_a_full_run_does_not_become_an_adapter(base, script, capsys):
    script('train.py', *TINY, '--out_dir=base', '--init_from=resume', '--max_iters=7', '--lora_rank=2')
    assert 'lora_rank stays 0, not 2' in capsys.readouterr().out and 'lora' not in load('base/ckpt.pt')


def test_another_base_is_refused(base, script, fails):
    script('train.py', *TINY, *LORA, '--max_iters=2')
    shutil.move('base', 'there')
    assert "no checkpoint in 'base'" in fails('sample.py', '--device=cpu')[1]
    script('train.py', *TINY, '--seed=3', '--out_dir=base', '--bias=True')
    for name in (('sample.py', '--device=cpu'), ('train.py', *TINY, '--init_from=resume'), ('export.py', '--path=x')):
        assert 'this adapter belongs to other weights than ckpt:/' in fails(*name)[1]
    shutil.rmtree('base')
    shutil.move('there', 'base')
    script('sample.py', '--device=cpu', '--num_samples=1', '--max_new_tokens=2')


@pytest.mark.parametrize('change', [
    {'lora': dict(rank=3, alpha=8.0, dropout=0.0, targets='c_attn')}, {'lora': {'rank': 2}}, {'base': {}},
    {'lora': dict(rank=2, alpha=8.0, dropout=0.0, targets='c_fc')}, {'lora': 'x'}, {'base': {'sources': ['ckpt:base']}},
    {'base': {'sources': 5}}, {'base': {'sources': [None]}},
    {'lora': dict(rank=2, alpha=8.0, dropout=0.0, targets=None)}])
def test_a_damaged_adapter_is_refused(base, script, fails, change):
    script('train.py', *TINY, *LORA, '--max_iters=2')
    torch.save({**load('out/ckpt.pt'), **change}, 'out/ckpt.pt')
    assert 'not one of ours' in fails('sample.py', '--device=cpu', '--ckpt=last')[1]


def test_sampling_and_going_on_from_an_adapter(base, script, capsys):
    """ both see base and adapter as one model """
    script('train.py', *TINY, *LORA, '--max_iters=10', '--learning_rate=0.1')
    model = build_model(load('out/ckpt_best.pt')).eval()
    idx = torch.randint(9, (2, 8))
    expected = model(idx, idx)[0]
    merged = build_model(weights_of('resume', 'out')).eval()
    assert torch.allclose(merged(idx, idx)[0], expected, atol=1e-5) and not lora_weights(merged)
    capsys.readouterr()
    for start in ('--out_dir=out', '--init_from=ckpt:out', '--init_from=ckpt:out/ckpt_best.pt'):
        script('sample.py', start, '--device=cpu', '--num_samples=1', '--temperature=0', '--start=abc')
    texts = capsys.readouterr().out.split('---------------\n')
    assert texts[0] == texts[1] == texts[2]
    state = script('train.py', *TINY, '--init_from=ckpt:out', '--out_dir=more', '--max_iters=0')
    assert torch.allclose(state['raw_model'].eval()(idx, idx)[0], expected, atol=1e-5)


def test_an_adapter_is_found_from_elsewhere_and_its_base_too(base, script, monkeypatch):
    script('train.py', *TINY, *LORA, '--max_iters=2')
    os.mkdir('elsewhere')
    monkeypatch.chdir('elsewhere')
    script('sample.py', '--out_dir=../out', '--device=cpu', '--num_samples=1', '--max_new_tokens=2')
    shutil.move('../base', 'base')   # and where it was, seen from here
    script('sample.py', '--out_dir=../out', '--device=cpu', '--num_samples=1', '--max_new_tokens=2')


def test_an_adapter_does_not_take_the_place_of_its_base(base, fails):
    before = sorted(os.listdir('base'))
    for start in ('base', 'base/ckpt.pt'):
        options = [*TINY, f'--init_from=ckpt:{start}', '--lora_rank=2', '--out_dir=./base']
        assert 'holds the weights that the adapter is for' in fails('train.py', *options)[1]
    assert sorted(os.listdir('base')) == before


def test_no_stages_for_an_adapter_that_is_resumed(base, script, fails):
    script('train.py', *TINY, *LORA, '--max_iters=2')
    assert 'choose one' in fails('train.py', *TINY, '--init_from=resume', '--unfreeze=head')[1]


def test_dropout_reaches_the_model_of_an_adapter(base, script):
    script('train.py', *TINY, *LORA, '--max_iters=2')
    model = build_model(load('out/ckpt.pt'), dropout=0.3)
    assert model.config.dropout == model.transformer.drop.p == model.transformer.h[0].mlp.dropout.p == 0.3


def test_dropout_is_that_of_the_input(monkeypatch):
    layer = LoRALinear(torch.nn.Linear(6, 3), 2, 4, 0.5)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 6)
    torch.manual_seed(1)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    expected = expected + 2 * torch.nn.functional.dropout(x, 0.5) @ layer.lora_A.T @ layer.lora_B.T
    torch.manual_seed(1)
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_a_fingerprint_is_of_every_number_name_and_shape():
    weights = {'a': torch.arange(6.0), 'b': torch.ones(2, 3)}
    changed = [{**weights, 'a': torch.tensor([0.0, 1, 2, 3, 4, 5.000001])}, {**weights, 'b': torch.ones(3, 2)},
               {'a': weights['a'], 'c': weights['b']}, {'a': weights['a']}, {**weights, 'a': weights['a'].half()},
               {**weights, 'b': torch.tensor([[1.0, 1, 1], [1, 1, -1]])}]
    assert len({fingerprint(each) for each in (weights, *changed)}) == 7
    assert fingerprint(dict(reversed(weights.items()))) == fingerprint(weights)


def test_lora_wants_weights(tiny, fails):
    for options in ([], ['--init_from=auto']):
        assert '--lora_rank wants weights to start from' in fails('train.py', *TINY, '--lora_rank=2', *options)[1]
    assert '--lora_rank=-1' in fails('train.py', *TINY, '--lora_rank=-1')[1]


@pytest.mark.parametrize('option, words', [
    ('--lora_targets=wte', 'lora_targets=wte some of'), ('--lora_dropout=1', 'lora_dropout=1.0'),
    ('--unfreeze=all', 'choose one')])
def test_wrong_lora_settings(base, fails, option, words):
    assert words in fails('train.py', *TINY, *LORA, option)[1] and not os.path.exists('out')


def shifted_shakespeare():
    """ tokens of a text, and of the same with its letters moved by one: related, and other """
    with open(os.path.join(ROOT, 'data', 'shakespeare_char', 'input.txt')) as file:
        text = file.read(200_000).lower()
    chars = sorted(set(text))
    ids = CharTokenizer(chars).encode(text)
    swap = {chars.index(a): chars.index(b) for a, b in zip('abcdefgh', 'bcdefgha', strict=True)}
    return chars, ids, np.array([swap.get(i, i) for i in ids.tolist()])


@pytest.mark.slow
def test_an_adapter_learns_nearly_what_finetuning_learns(here, script):
    """ other text, as many steps: at most 1.05 times its loss """
    torch.set_num_threads(2)
    chars, text, other = shifted_shakespeare()
    for name, ids in (('text', text), ('other', other)):
        os.makedirs(f'data/{name}')
        write_dataset(f'data/{name}', CharTokenizer(chars), {'train': ids[:-20_000], 'val': ids[-20_000:]})
    common = ['--device=cpu', '--dtype=float32', '--compile=False', '--batch_size=16', '--block_size=32',
              '--gradient_accumulation_steps=1', '--eval_iters=20', '--eval_interval=300', '--log_interval=300',
              '--n_layer=2', '--n_head=2', '--n_embd=64', '--warmup_iters=20', '--beta2=0.99']
    script('train.py', *common, '--dataset=text', '--out_dir=base', '--max_iters=500', '--lr_decay_iters=500',
           '--learning_rate=3e-3', '--min_lr=3e-4')
    losses = {}
    for name, options in (('full', ['--learning_rate=1e-3', '--min_lr=1e-4']),
                          ('lora', ['--learning_rate=1e-2', '--min_lr=1e-3', '--lora_rank=8', '--lora_alpha=16',
                                    '--lora_targets=c_attn,c_proj,c_fc'])):
        script('train.py', *common, '--dataset=other', '--init_from=ckpt:base', f'--out_dir={name}', '--max_iters=300',
               '--lr_decay_iters=300', *options)
        losses[name] = records('val_loss', f'{name}/log.jsonl')[-1]['val_loss']
    print(losses)
    assert losses['lora'] <= 1.05 * losses['full'] < 2.5


# ---- gradual unfreezing

def test_stages():
    stages = unfreezing('head:1000,3:500, all', 12)
    assert stages == [(0, 13), (1000, 10), (1500, 0)]
    assert [frozen_at(stages, i) for i in (0, 999, 1000, 1499, 1500, 10**6)] == [13, 13, 10, 10, 0, 0]
    assert unfreezing('', 12) == [] and frozen_at([], 5) == 0
    assert unfreezing('12:5,head:7', 12) == [(0, 1), (5, 13)]


@pytest.mark.parametrize('text', ['heads', '13', '0:5,all', 'head,all', 'head:x,all', 'head:-1,all', 'all:5,', ',',
                                  '1.5'])
def test_impossible_stages(text):
    with pytest.raises(ValueError, match=f'unfreeze={text}: '):
        unfreezing(text, 12)


PARTS = {'head': ['lm_head', 'transformer.wte', 'transformer.ln_f'],
         '1': ['lm_head', 'transformer.wte', 'transformer.ln_f', 'transformer.h.1.'],
         '2': ['lm_head', 'transformer.wte', 'transformer.ln_f', 'transformer.h.'], 'all': ['']}


@pytest.mark.parametrize('stage', PARTS)
def test_a_stage_changes_exactly_what_it_names(base, script, stage):
    state = script('train.py', *TINY, '--init_from=ckpt:base', f'--unfreeze={stage}', '--max_iters=1')
    before, after = load('base/ckpt_best.pt')['model'], load('out/ckpt.pt')['model']
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(tuple(PARTS[stage]))}
    frozen = [p for name, p in state['raw_model'].named_parameters() if not name.startswith(tuple(PARTS[stage]))]
    assert all(p.grad is None and p not in state['optimizer'].state for p in frozen)


def test_an_untied_head_leaves_the_embedding_alone(here, script):
    os.makedirs('data/tiny')
    write_dataset('data/tiny', CharTokenizer('abcdefghi'), {'train': np.arange(300) % 9, 'val': np.arange(99) % 9})
    model = tiny_model(tie=False)
    torch.save({'model': model.state_dict(), 'model_args': model.config.model_args()}, 'base.pt')
    script('train.py', *TINY, '--init_from=ckpt:base.pt', '--unfreeze=1', '--max_iters=1')
    after = load('out/ckpt.pt')['model']
    changed = {name for name, tensor in model.state_dict().items()
               if 'wpe' not in name and not torch.equal(tensor, after[name])}
    assert changed == {name for name in after if name.startswith(('lm_head', 'transformer.ln_f', 'transformer.h.2.'))}


@pytest.mark.parametrize('frozen', [1, 2, 3, 4])
def test_the_head_learns_as_the_head_alone(frozen):
    """ the gradient of a tied head is that of an untied one, although the matrix is the embedding too """
    model, untied = tiny_model(), tiny_model(tie=False)
    untied.load_state_dict(model.state_dict())
    idx = torch.randint(9, (2, 8))
    for each in (model, untied):
        train_only(each, frozen)
        each(idx, idx)[1].backward()
    assert torch.equal(model.lm_head.weight.grad, untied.lm_head.weight.grad)


def test_stages_follow_each_other_and_what_stays_keeps_its_moments(base, script, capsys):
    script('train.py', *TINY, '--init_from=ckpt:base', '--unfreeze=head:2,1:2,all', '--max_iters=6')
    out = capsys.readouterr().out
    for words in ('iter 0: training the head;', 'iter 2: training the head and the last 1 blocks;',
                  'iter 4: training all\n'):
        assert words in out
    checkpoint = load('out/ckpt.pt')
    model = build_model(load('out/ckpt.pt'))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    named = {id(p): name for name, p in model.named_parameters()}
    names = [named[id(p)] for group in optimizer.param_groups for p in group['params']]
    steps = {names[i]: int(state['step']) for i, state in checkpoint['optimizer']['state'].items()}
    assert steps['lm_head.weight' if 'lm_head.weight' in steps else 'transformer.wte.weight'] == 6
    assert steps['transformer.ln_f.weight'] == 6 and steps['transformer.wpe.weight'] == 2
    assert steps['transformer.h.1.mlp.c_fc.weight'] == 4 and steps['transformer.h.0.mlp.c_fc.weight'] == 2


@pytest.mark.parametrize('at', [1, 2, 3])
def test_unfreezing_resumed_is_the_run_that_ran_through(base, script, at):
    options = [*TINY, '--unfreeze=head:2,all', '--dropout=0.1']
    script('train.py', *options, '--init_from=ckpt:base', '--out_dir=through', '--max_iters=5')
    script('train.py', *options, '--init_from=ckpt:base', f'--max_iters={at}')
    script('train.py', *options, '--init_from=resume', '--max_iters=5')
    assert equal(tensors('through/ckpt.pt'), tensors('out/ckpt.pt'))


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_unfreezing_on_two_processes(base, script, processes, parallel):
    options = [*TINY, '--init_from=ckpt:base', '--unfreeze=head:2,1:2,all', '--max_iters=6']
    script('train.py', *options, '--out_dir=one')
    run = processes(2, 'train.py', *options, '--out_dir=two', f'--parallel={parallel}')
    assert run.wait() == [0, 0], run.text()
    one, two = tensors('one/ckpt.pt'), tensors('two/ckpt.pt')
    assert one.keys() == two.keys() and all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)


# ---- learning-rate range test

@pytest.fixture
def learnable(base):
    """ data/tiny anew, with something to learn: three words in any order """
    words = [np.arange(0, 3), np.arange(3, 6), np.arange(6, 9)]
    ids = np.concatenate([words[i] for i in np.random.default_rng(0).integers(0, 3, 700)])
    write_dataset('data/tiny', CharTokenizer('\nabcdefgh'), {'train': ids[:-300], 'val': ids[-300:]})


def test_the_range_test_writes_a_suggestion_and_leaves_the_run_alone(learnable, script, capsys):
    before = {name: open(f'base/{name}', 'rb').read() for name in os.listdir('base')}
    script('lr_find.py', *TINY, '--out_dir=base', '--num_steps=60', '--first_lr=1e-5')
    found = json.load(open('base/lr_find.json'))
    assert f"suggestion: --learning_rate={found['suggestion']:.1e}" in capsys.readouterr().out
    assert found['suggestion'] == found['lowest'] / 10 and 1e-5 < found['suggestion'] < 1
    assert len(found['lr']) == len(found['loss']) == len(found['smoothed']) <= 60
    ratios = np.divide(found['lr'][1:], found['lr'][:-1])
    assert found['lr'][0] == 1e-5 and np.allclose(ratios, (1 / 1e-5) ** (1 / 59))
    assert open('base/lr_find.png', 'rb').read(4) == b'\x89PNG'
    assert {name: open(f'base/{name}', 'rb').read() for name in before} == before


def test_the_range_test_takes_the_steps_of_train(learnable, script):
    """ with a constant rate both have the same losses """
    script('lr_find.py', *TINY, '--num_steps=12', '--first_lr=0.00999999', '--last_lr=0.01')
    losses = json.load(open('out/lr_find.json'))['loss'][:10]
    script('train.py', *TINY, '--decay_lr=False', '--max_iters=10', '--out_dir=run')
    assert losses == pytest.approx([record['loss'] for record in records('loss', 'run/log.jsonl')], abs=1e-4)


def test_the_range_test_with_an_adapter_and_with_a_stage(learnable, script):
    for options in (LORA, ['--init_from=ckpt:base', '--unfreeze=head:9,all']):
        state = script('lr_find.py', *TINY, *options, '--num_steps=30', '--first_lr=1e-4')
        names = {name for name, p in state['model'].named_parameters() if p.requires_grad}
        assert 'transformer.wpe.weight' not in names and len(names) < 6


def test_the_range_test_of_a_resumed_run_has_its_stage(learnable, script):
    script('train.py', *TINY, '--init_from=ckpt:base', '--unfreeze=head:2,all', '--max_iters=3')
    state = script('lr_find.py', *TINY, '--init_from=resume', '--unfreeze=head:2,all', '--num_steps=30',
                   '--first_lr=1e-4')
    assert all(p.requires_grad for p in state['model'].parameters())


@pytest.mark.parametrize('option, words', [
    ('--num_steps=5', '--num_steps=5 must be at least 10'), ('--first_lr=2', '--first_lr=2.0'),
    ('--explosion=1', '--explosion=1.0'), ('--smoothing=1', '--smoothing=1.0'), ('--dataset=none', 'none'),
    ('--num_step=5', "did you mean 'num_steps'"), ('--first_lr=1', 'the loss rises from step')])
def test_wrong_range_tests(tiny, fails, option, words):
    assert words in fails('lr_find.py', *TINY, option, '--last_lr=1.5')[1]
    assert os.path.exists('out/lr_find.png') == (option == '--first_lr=1')   # to look at


# ---- export

def trained_gpt2(folder, **options):
    """ a checkpoint with GPT-2's tokenizer """
    model = tiny_model(**{**dict(vocab_size=50304, block_size=300), **options})
    os.makedirs(folder)
    torch.save({'model': model.state_dict(), 'model_args': model.config.model_args(), 'tokenizer': {'name': 'gpt2'},
                'iter_num': 7, 'config': {'dataset': 'openwebtext'}}, f'{folder}/ckpt.pt')
    return model.eval()


@pytest.mark.parametrize('options', [{}, {'bias': False}, {'gelu': 'tanh', 'norm_eps': 1e-3}, {'tie': False},
                                     {'tie': False, 'bias': False}])
def test_transformers_loads_the_same_logits_and_writes_the_same_text(here, script, capsys, options):
    model = trained_gpt2('out', **options)
    script('export.py', '--path=exported')
    theirs, report = GPT2LMHeadModel.from_pretrained('exported', output_loading_info=True)
    assert not any(report[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    idx = torch.randint(50257, (2, 60))
    with torch.no_grad():
        ours = model(idx, idx)[0][..., :50257]
        assert (theirs(idx).logits - ours).abs().max() <= 2e-5
        again = GPT.from_pretrained('exported').eval()
        assert (again(idx, idx)[0] - ours).abs().max() <= 2e-5
    text = theirs.generate(idx[:1, :8], max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    assert model.generate(idx[:1, :8], 200, temperature=0.0, num_ids=50257)[0].tolist() == text.tolist()


def test_its_tokenizer_comes_along(here, script):
    trained_gpt2('out')
    script('export.py', '--path=exported')
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained('exported')
    text = 'Hello World, \u4f60\u597d!\n  def f(x):'
    assert tokenizer(text)['input_ids'] == BPETokenizer('gpt2').encode(text).tolist()
    assert tokenizer.eos_token_id == 50256 and tokenizer.model_max_length == 300
    said = json.load(open('exported/generation_config.json'))
    assert said['eos_token_id'] == 50256


def test_a_model_of_characters_is_exported_with_them(base, script, capsys):
    script('export.py', '--out_dir=base', '--path=exported')
    assert "this model has char" in capsys.readouterr().out
    for start in (['--out_dir=base'], ['--init_from=exported']):
        script('sample.py', *start, '--device=cpu', '--num_samples=1', '--temperature=0', '--start=abc')
    one, two, _ = capsys.readouterr().out.split('---------------\n')
    assert one == two and len(one) > 100


def test_a_merged_adapter_is_exported(base, script):
    script('train.py', *TINY, *LORA, '--max_iters=10', '--learning_rate=0.1')
    script('export.py', '--path=exported')
    model, idx = build_model(load('out/ckpt_best.pt')).eval(), torch.randint(9, (2, 8))
    with torch.no_grad():
        logits = GPT2LMHeadModel.from_pretrained('exported')(idx).logits
        assert (logits - model(idx, idx)[0]).abs().max() <= 2e-5


@pytest.mark.parametrize('targets', ['c_attn', 'c_proj', 'c_attn,c_proj, c_fc'])
def test_peft_loads_an_adapter_on_the_exported_base(base, script, targets):
    peft = pytest.importorskip('peft')
    script('train.py', *TINY, *LORA, '--max_iters=10', '--learning_rate=0.1', f'--lora_targets={targets}')
    script('export.py', '--init_from=ckpt:base', '--path=exported')
    script('export.py', '--to=peft', '--path=adapter')
    theirs = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained('exported'), 'adapter').eval()
    ours, idx = build_model(load('out/ckpt_best.pt')).eval(), torch.randint(9, (2, 8))
    with torch.no_grad():
        assert (theirs(idx).logits - ours(idx, idx)[0]).abs().max() <= 2e-5
        assert (theirs(idx).logits - GPT.from_pretrained('exported').eval()(idx, idx)[0]).abs().max() > 1e-3


def test_a_checkpoint_for_nanogpt(base, script):
    """ the keys that it reads, its own fields of the configuration, the optimizer; nothing that it has no name for """
    script('export.py', '--out_dir=base', '--to=nanogpt', '--path=plain/ckpt.pt', '--ckpt=last')
    plain, full = load('plain/ckpt.pt'), load('base/ckpt.pt')
    assert plain.keys() == {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'}
    assert plain['model_args'].keys() == {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}
    assert equal(plain['model'], full['model'])
    assert plain['optimizer']['state'].keys() == full['optimizer']['state'].keys()
    script('train.py', *TINY, '--out_dir=plain', '--init_from=resume', '--max_iters=7')


def test_an_adapter_for_nanogpt(base, script, capsys):
    script('train.py', *TINY, *LORA, '--max_iters=10')
    script('export.py', '--to=nanogpt', '--path=ckpt.pt', '--ckpt=last')
    assert 'no optimizer' in capsys.readouterr().out
    plain = load('ckpt.pt')
    assert plain['model'].keys() == load('base/ckpt.pt')['model'].keys() and 'optimizer' not in plain


@pytest.mark.parametrize('options, words', [
    (['--path=out'], '--path=out exists'), ([], 'say where to'), (['--path=x', '--to=onnx'], '--to=onnx is none of'),
    (['--path=x', '--to=peft'], 'is no adapter'), (['--path=x', '--out_dir=none'], "no checkpoint in 'none'"),
    (['--path=x', '--to=nanogpt', '--init_from=ckpt:untied'], 'nanoGPT has no model with tie=False'),
    (['--path=/proc/x'], '/proc/x was not written'), (['--path=/proc/x', '--to=nanogpt'], '/proc/x was not written'),
    (['--path=x', '--ckpt=first'], '--ckpt=first')])
def test_wrong_exports(here, fails, options, words):
    trained_gpt2('out')
    trained_gpt2('untied', tie=False)
    assert words in fails('export.py', *options)[1] and not os.path.exists('x')


def test_a_checkpoint_with_few_fields_for_nanogpt(here, script):
    trained_gpt2('out')
    state = load('out/ckpt.pt')
    del state['model_args']['dropout']
    torch.save(state, 'out/ckpt.pt')
    script('export.py', '--to=nanogpt', '--path=plain.pt')
    assert load('plain.pt')['model_args']['dropout'] == 0.0


def test_a_full_disk_leaves_no_folder(here, fails, monkeypatch):
    def full(*arguments):
        raise OSError(28, 'No space left on device')
    trained_gpt2('out')
    monkeypatch.setattr('safetensors.torch.save_file', full)
    assert 'x was not written ([Errno 28] No space left on device)' in fails('export.py', '--path=x')[1]
    assert sorted(os.listdir()) == ['out']
