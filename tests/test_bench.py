""" bench.py, the real script, on a tiny model. """
import json

import pytest

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
    import time

    from engine import Sampling
    draw = Sampling.draw
    monkeypatch.setattr(Sampling, 'draw', lambda *inputs: (time.sleep(0.01), draw(*inputs))[1])
    found = last_line(script, capsys, '--num_samples=2')
    assert 100 < found['tokens_per_second'] <= 200 and 0.01 <= found['first_token'] < 0.05


def test_bandwidth_is_bytes_by_seconds(here, script, monkeypatch):
    measured = script('bench.py', *TINY)
    clock = iter([1.0, 3.0])
    monkeypatch.setattr('time.perf_counter', lambda: next(clock))
    assert measured['read_bandwidth']() == measured['array'].element_size() * len(measured['array']) / 2
    assert measured['array'].nbytes >= 2**28   # more than caches hold


@pytest.mark.parametrize('options, words', [
    (['--mode=train'], '--mode=train is not generate'), (['--num_samples=0'], '--num_samples=0'),
    (['--prompt_length=0'], '--prompt_length=0'), (['--repeats=0'], '--repeats=0'), (['--n_head=3'], 'n_head=3'),
    (['--quantize=int4'], 'quantize=int4'), (['--temperature=-1'], 'temperature=-1'),
    (['--dtype=int8'], '--dtype=int8'), (['--device=tpu'], '--device=tpu'),
    (['--batchsize=1'], "unknown key 'batchsize'")])
def test_wrong_input(here, fails, options, words):
    assert words in fails('bench.py', *TINY, *options)[1]
