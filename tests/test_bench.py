""" bench.py, the real script, on a tiny model. """
import json
import os
import time

import pytest
import torch

TINY = ['--mode=generate', '--device=cpu', '--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=16',
        '--vocab_size=64', '--max_new_tokens=20', '--repeats=3', '--dtype=float32']


def last_line(script, capsys, *options):
    script('bench.py', *TINY, *options)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize('options, name, size', [
    ([], 'float32', 4), (['--dtype=bfloat16'], 'bfloat16', 2), (['--quantize=int8'], 'int8', 1)])
def test_generation_is_measured(here, script, capsys, options, name, size):
    """ the last line is JSON, the bound is arithmetic on what was measured """
    found = last_line(script, capsys, '--num_samples=3', '--prompt_length=5', *options)
    parameters = 64 * 32 + 12 * 32 * 32 + 3 * 32   # the head, a block, three norms without bias
    assert (found['mode'], found['dtype'], found['parameters']) == ('generate', name, parameters)
    assert found['weight_bytes'] == size * parameters
    assert found['bandwidth_bound'] == pytest.approx(3 * found['read_bandwidth'] / (size * parameters))
    assert found['share_of_bound'] == pytest.approx(found['tokens_per_second'] / found['bandwidth_bound'])
    assert len(found['tokens_per_second_all']) == 3
    assert sorted(found['tokens_per_second_all'])[1] == found['tokens_per_second'] > 0
    assert 0 < found['first_token'] < 3 * 20 / min(found['tokens_per_second_all'])


def test_tokens_per_second_are_those_of_a_slow_model(here, script, capsys, monkeypatch):
    """ 10 milliseconds a token, whatever else: 100 tokens per second a row at most, and nearly so """
    from engine import Sampling
    draw = Sampling.draw
    monkeypatch.setattr(Sampling, 'draw', lambda *inputs: (time.sleep(0.01), draw(*inputs))[1])
    found = last_line(script, capsys, '--num_samples=2')
    assert 100 < found['tokens_per_second'] <= 200 and 0.01 <= found['first_token'] < 0.05


def test_bandwidth_is_bytes_by_seconds(here, script, monkeypatch):
    measured = script('bench.py', *TINY)
    clock = iter([1.0, 3.0])
    monkeypatch.setattr('time.perf_counter', lambda: next(clock))
    assert measured['read_bandwidth'](torch.ones(10)) == 4 * 10 / 2


# ---- training

SMALL = ['--device=cpu', '--compile=False', '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=8',
         '--batch_size=3', '--dtype=float32', '--burn_in=1', '--steps=5']


def trained(script, capsys, *options):
    """ (what was printed before, the last line) """
    script('bench.py', *SMALL, *options)
    *lines, last = capsys.readouterr().out.splitlines()
    return '\n'.join(lines), json.loads(last)


def test_an_iteration_is_measured(tiny, script, capsys):
    out, found = trained(script, capsys, '--dataset=tiny', '--vocab_size=11')
    capsys.readouterr()
    assert (found['mode'], found['dataset'], found['compile'], found['processes']) == ('train', 'tiny', False, 1)
    assert len(found['times']) == 5 and found['time_per_iteration'] == sorted(found['times'])[2]
    parameters = 11 * 16 + 12 * 16 * 16 + 3 * 16
    assert found['parameters'] == parameters and found['flops'] == (6 * parameters + 12 * 16 * 8) * 8 * 3
    assert found['tokens_per_second'] == pytest.approx(24 / found['time_per_iteration'])
    assert list(found['split']) == ['data', 'forward', 'backward', 'optimizer']
    assert sum(found['split'].values()) >= 0.99 * found['time_per_iteration']
    milliseconds = f"{found['time_per_iteration'] * 1e3:.2f}"
    assert f"time per iteration: {milliseconds}ms, MFU: n/a" in out and found['mfu'] is None
    assert found['measured_peak'] > 1e9 and "of a large product's" in out and 'random' not in out


def test_a_known_peak_gives_mfu(tiny, script, capsys, monkeypatch):
    monkeypatch.setattr('common.peak_flops', lambda name, dtype: 1e12)
    out, found = trained(script, capsys, '--dataset=tiny')
    assert found['mfu'] == pytest.approx(found['flops'] / found['time_per_iteration'] / 1e12)
    assert f"MFU: {found['mfu']:.2%}" in out and found['measured_peak'] is None


@pytest.mark.parametrize('options, why', [([], 'because data/openwebtext is not there'), (['--real_data=False'], '')])
def test_without_data_the_tokens_are_random(here, script, capsys, options, why):
    out, found = trained(script, capsys, *options)
    assert f'random tokens{why and ", "}{why}\n' in out and found['dataset'] == 'random'
    assert found['parameters'] == 50304 * 16 + 12 * 16 * 16 + 3 * 16
    assert os.listdir() == []


def test_forward_and_data_alone(tiny, script, capsys):
    _, whole = trained(script, capsys, '--dataset=tiny')
    _, found = trained(script, capsys, '--dataset=tiny', '--mode=forward')
    assert found['mode'] == 'forward' and found['flops'] == whole['flops'] // 3 and not found['split']
    out, found = trained(script, capsys, '--dataset=tiny', '--mode=data')
    assert found['batches_per_second'] == pytest.approx(1 / sorted(found['times'])[2]) and 'batches/s of 3 x 8' in out


def test_the_split_is_where_the_time_goes(tiny, script, capsys, monkeypatch):
    """ 20 milliseconds in the forward pass, 40 in the update """
    import model
    import optim
    forward, update = model.GPT.forward, optim.update
    monkeypatch.setattr(model.GPT, 'forward', lambda *a, **b: (time.sleep(0.02), forward(*a, **b))[1])
    monkeypatch.setattr(optim, 'update', lambda *a: (time.sleep(0.04), update(*a))[1])
    split = trained(script, capsys, '--dataset=tiny')[1]['split']
    assert split['forward'] >= 0.02 and split['optimizer'] > 0.02 > split['backward']   # a busy machine adds to each


def test_variants_side_by_side(tiny, script, capsys):
    out, found = trained(script, capsys, '--dataset=tiny', '--compare=grad_checkpoint,batch_size=6,dtype')
    rows = found['variants']
    assert [row['variant'] for row in rows] == ['as given', 'grad_checkpoint', 'batch_size=6', 'dtype']
    assert all(len(row['times']) == 5 for row in rows)
    assert rows[2]['speed'] == pytest.approx(48 / sorted(rows[2]['times'])[2])
    table = out.splitlines()[-4:]
    assert table[0].startswith('as given') and table[0].endswith(' 1.000')
    assert float(table[2].split()[-1]) == pytest.approx(rows[2]['speed'] / rows[0]['speed'], abs=1e-3)


def test_a_trace_for_tensorboard(tiny, script, capsys):
    out, _ = trained(script, capsys, '--dataset=tiny', '--profile=True')
    name, = os.listdir('bench_log')
    events = json.load(open(os.path.join('bench_log', name)))['traceEvents']
    assert any('aten::mm' in str(event.get('name')) or 'aten::addmm' in str(event.get('name')) for event in events)
    assert 'Self CPU' in out


@pytest.mark.slow
def test_two_processes_and_their_efficiency(tiny, processes):
    run = processes(2, 'bench.py', *SMALL, '--dataset=tiny', patch="import os; os.environ['WORLD_SIZE'] = '2'")
    assert run.wait() == [0, 0], run.text()
    found = json.loads(next(line for line in run.text().splitlines() if line.startswith('{')))
    assert found['processes'] == 2 and found['scaling_efficiency'] > 0 and 'scaling efficiency ' in run.text()


def test_flops_are_those_of_the_products():
    """ torch counts the matrix products that run: the parameters but norms, and both products of attention """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from model import GPT, GPTConfig
    gpt = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=3, n_head=2, n_embd=48, bias=False))
    idx = torch.randint(64, (2, 32))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gpt(idx, idx)[1].backward()
    norms = sum(p.numel() for name, p in gpt.named_parameters() if 'ln_' in name)
    assert counter.get_total_flops() == (gpt.flops_per_token() - 6 * norms) * idx.numel()


@pytest.mark.parametrize('options, words', [
    (['--mode=tune'], '--mode=tune is none of train, forward, data, generate'),
    (['--mode=train', '--compare=n_layers'], "'n_layers' is no key"), (['--compare=bias'], '--compare is for'),
    (['--mode=train', '--compare=n_layer=x'], 'invalid literal'), (['--steps=0'], '--steps=0'),
    (['--mode=train', '--n_head=3'], 'n_head=3'),
    (['--num_samples=0'], '--num_samples=0'),
    (['--prompt_length=0'], '--prompt_length=0'), (['--repeats=0'], '--repeats=0'), (['--n_head=3'], 'n_head=3'),
    (['--quantize=int4'], 'quantize=int4'), (['--temperature=-1'], 'temperature=-1'),
    (['--dtype=int8'], '--dtype=int8'), (['--device=tpu'], '--device=tpu'),
    (['--batchsize=1'], "unknown key 'batchsize'")])
def test_wrong_input(here, fails, options, words):
    assert words in fails('bench.py', *TINY, *options)[1]
