""" sample.py, the real script, on a small trained run. """
import contextlib
import hashlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY

import engine
from checkpoint import build_model, load

SHORT = ['--out_dir=out', '--device=cpu', '--num_samples=2', '--max_new_tokens=6']


@pytest.fixture
def trained(tiny, script, capsys):
    """ a working directory with a run in out and nothing of its data """
    script('train.py', *TINY, '--max_iters=2')
    (tiny / 'data').rename(tiny / 'moved')
    capsys.readouterr()
    return tiny


def texts(capsys):
    return capsys.readouterr().out.split('\n---------------\n')[:-1]


def test_samples_need_no_data_and_follow_the_seed(trained, script, capsys):
    script('sample.py', *SHORT, '--start=abc')
    first = texts(capsys)
    assert len(first) == 2 and all(text.startswith('abc') and len(text) == 9 for text in first) and first[0] != first[1]
    script('sample.py', *SHORT, '--start=abc')
    assert texts(capsys) == first
    script('sample.py', *SHORT, '--start=abc', '--seed=1')
    assert texts(capsys) != first


def test_greedy_text_is_that_of_the_model(trained, script, capsys):
    script('sample.py', *SHORT, '--start=abc', '--temperature=0')
    model, x = build_model(load('out/ckpt_best.pt')).eval(), torch.tensor([[1, 2, 3]])
    for _ in range(6):
        x = torch.cat((x, model(x[:, -8:])[0][:, -1:].argmax(-1)), 1)
    assert texts(capsys) == [''.join('\nabcdefgh'[i] for i in x[0])] * 2


@pytest.mark.parametrize('options, length', [
    (['--start='], 7), (['--top_k=0'], 7), (['--top_k=5000'], 7), (['--temperature=0'], 7),
    (['--temperature=2', '--top_k=1'], 7),
    (['--start=FILE:prompt.txt'], 13), (['--dtype=bfloat16'], 7), (['--ckpt=last'], 7)])
def test_options(trained, script, capsys, options, length):
    open('prompt.txt', 'w', encoding='utf-8-sig').write('abc\ndefg')
    script('sample.py', *SHORT, *options)
    assert [len(text) for text in texts(capsys)] in ([length] * 2, [length + 1] * 2)   # a newline more or less


def test_a_long_prompt_is_cropped_with_a_note(trained, script, capsys):
    script('sample.py', *SHORT, '--start=' + 'abcdefgh' * 3)
    out, err = capsys.readouterr()
    assert out.startswith('abcdefgh' * 3) and "of the prompt's 24 tokens the model sees the last 8" in err
    open('prompts.txt', 'w').write('abc\n' + 'abcdefgh' * 2)
    script('sample.py', *SHORT, '--prompts=prompts.txt')
    assert "of the prompt's 16 tokens the model sees the last 8" in capsys.readouterr().err
    script('sample.py', *SHORT, '--start=abcdefgh')
    assert 'note' not in capsys.readouterr().err


@pytest.mark.parametrize('options, words', [
    (['--start=aZ42'], "not in the vocabulary: '2' '4' 'Z'; it has '\\nabcdefgh'"),
    (['--start=FILE:none.txt'], 'none.txt'),
    (['--start=FILE:binary'], "can't decode byte 0xff"),
    (['--temperature=-1'], '--temperature=-1.0'), (['--top_k=-3'], '--top_k=-3'),
    (['--num_samples=0'], '--num_samples=0'), (['--max_new_tokens=0'], '--max_new_tokens=0'),
    (['--ckpt=old'], '--ckpt=old'),
    (['--out_dir=gone'], "no checkpoint in 'gone'; --out_dir=out has one"), (['--init_from=gpt9'], '--init_from=gpt9'),
    (['--prompts=none.txt'], 'none.txt'), (['--prompts=empty.txt'], 'empty.txt has no prompts'),
    (['--prompts=numbers.json'], 'numbers.json has no prompts'), (['--prompts=half.json'], 'half.json'),
    (['--prompts=binary'], "can't decode byte 0xff"), (['--prompts=foreign.txt'], "not in the vocabulary: 'Z'"),
    (['--interactive=True', '--out=x.json'], '--interactive=True'), (['--top_p=2'], 'top_p=2.0'),
    (['--quantize=int4'], 'quantize=int4 is not int8'),
    (['--temprature=1'], "did you mean 'temperature'?")])
def test_wrong_input(trained, fails, options, words):
    open('binary', 'wb').write(b'\xff\xfe')
    for name, content in (('empty.txt', '\n\n'), ('numbers.json', '[1, 2]'), ('half.json', '["abc", '),
                          ('foreign.txt', 'abc\nZ')):
        open(name, 'w').write(content)
    assert words in fails('sample.py', *SHORT, *options)[1]


def test_nanogpts_own_checkpoint(tiny, script, fails, capsys):
    """ its tokenizer is that of data/<dataset>; without the folder there is none that fits """
    script('train.py', *TINY, '--max_iters=1')
    ours = torch.load('out/ckpt.pt', weights_only=True)
    os.makedirs('theirs')
    torch.save({key: ours[key] for key in ('model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config')},
               'theirs/ckpt.pt')
    os.remove('data/tiny/meta.json')   # leaves meta.pkl
    capsys.readouterr()
    script('sample.py', *SHORT, '--out_dir=theirs', '--start=abc')
    assert len(texts(capsys)) == 2
    os.remove('data/tiny/meta.pkl')
    assert 'the model knows 9 ids' in fails('sample.py', *SHORT, '--out_dir=theirs')[1]


@pytest.mark.parametrize('start', ['Hello World', '', '<|endoftext|>'])
def test_gpt2_tokens_never_come_from_the_padding(here, script, capsys, start):
    """ ids 50257 to 50303 of a padded vocabulary decode to nothing and must not be drawn, however likely they are """
    from checkpoint import save
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50304, 1, 1, 8))
    with torch.no_grad():
        model.lm_head.weight[50257:] *= 1000
    save('out/ckpt.pt',
         {'model': model.state_dict(), 'model_args': model.config.model_args(), 'tokenizer': {'name': 'gpt2'}})
    script('sample.py', *SHORT, f'--start={start}', '--top_k=0')
    samples = texts(capsys)
    assert len(samples) == 2 and all(text.startswith(start or '<|endoftext|>') for text in samples)


def test_compile_on_a_cpu_changes_nothing(trained, script, capsys):
    """ and takes no time: the layout of the weights is what makes generation faster there """
    script('sample.py', *SHORT, '--start=abc')
    eager = texts(capsys)
    script('sample.py', *SHORT, '--start=abc', '--compile=True')
    assert texts(capsys) == eager


# ---- where texts end

def test_a_stop_ends_each_sample_by_itself(trained, script, capsys):
    script('sample.py', *SHORT, '--num_samples=9', '--max_new_tokens=30', '--start=abc', '--temperature=3')
    free = texts(capsys)
    script('sample.py', *SHORT, '--num_samples=9', '--max_new_tokens=30', '--start=abc', '--temperature=3',
           '--stop=["e", "fg"]')
    ends = [min(text.find(stop) if stop in text else 99 for stop in ('e', 'fg')) for text in free]
    assert texts(capsys) == [text[:end] for text, end in zip(free, ends, strict=True)] and len(set(ends)) > 3


@pytest.fixture
def gpt2(here):
    """ a tiny model of GPT-2's tokens, in out, that ends every text at its third token """
    from checkpoint import save
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50304, 1, 1, 8))
    with torch.no_grad():   # what stands at position 3 and no other leads to id 50256
        model.transformer.wpe.weight[3] = 100 * torch.nn.functional.one_hot(torch.tensor(5), 8)
        model.transformer.wpe.weight[[0, 1, 2, 4, 5, 6, 7], 5] = -100
        model.lm_head.weight[50256] = 30 * torch.nn.functional.one_hot(torch.tensor(5), 8)
    save('out/ckpt.pt',
         {'model': model.state_dict(), 'model_args': model.config.model_args(), 'tokenizer': {'name': 'gpt2'}})


def test_a_text_ends_where_its_document_does(gpt2, script, capsys):
    script('sample.py', *SHORT, '--start=Hello World', '--temperature=0.01')
    ended = texts(capsys)
    script('sample.py', *SHORT, '--start=Hello World', '--temperature=0.01', '--stop_at_eot=False')
    free = texts(capsys)
    assert ended == [text.split('<|endoftext|>')[0] for text in free] and all('<|endoftext|>' in text for text in free)


# ---- several prompts

@pytest.mark.parametrize('name, content, prompts', [
    ('lines.txt', 'abc\n\na\nabcdefgh\n', ['abc', 'a', 'abcdefgh']), ('windows.txt', '\ufeffabc\r\nde', ['abc', 'de']),
    ('list.json', '["abc", "a\\nb", ""]', ['abc', 'a\nb', '\n'])])
def test_a_file_of_prompts(trained, script, capsys, name, content, prompts):
    """ each prompt has the samples that it has alone, in order """
    with open(name, 'w', encoding='utf-8', newline='') as file:
        file.write(content)
    script('sample.py', *SHORT, f'--prompts={name}')
    together, alone = texts(capsys), []
    for prompt in prompts:
        script('sample.py', *SHORT, f'--start={prompt}')
        alone += texts(capsys)
    assert together == alone


def results(path='results.json'):
    """ what is in it; NaN and Infinity, which are no JSON, fail """
    return json.load(open(path, encoding='utf-8'), parse_constant=lambda name: pytest.fail(name))


def test_results_as_json(trained, script, capsys):
    open('prompts.txt', 'w').write('abc\na')
    options = ['--prompts=prompts.txt', '--num_samples=9', '--stop=e', '--max_new_tokens=12', '--temperature=3']
    script('sample.py', *SHORT, *options)
    printed = texts(capsys)
    script('sample.py', *SHORT, *options, '--out=results.json')
    out, err = capsys.readouterr()
    state = results()
    assert out == '' and state['complete'] and [each['prompt'] for each in state['results']] == ['abc', 'a']
    samples = [(each['prompt'], sample) for each in state['results'] for sample in each['samples']]
    assert [prompt + sample['text'] for prompt, sample in samples] == printed
    assert [sample['seed'] for _, sample in samples] == list(range(1337, 1346)) * 2
    assert {sample['finish'] for _, sample in samples} == {'stop', 'length'}
    assert all(sample['num_tokens'] == len(sample['text']) + (sample['finish'] == 'stop') for _, sample in samples)
    model = state['model']
    assert model['checkpoint'] == os.path.join('out', 'ckpt_best.pt') and model['iter_num'] == 2
    assert model['sha256'] == hashlib.sha256(open('out/ckpt_best.pt', 'rb').read()).hexdigest()
    assert model['model_args'] == load('out/ckpt_best.pt')['model_args']
    assert state['options']['temperature'] == 3.0 and state['options']['stop'] == 'e'


@pytest.mark.slow
@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interruption_leaves_what_is_finished(trained, processes, script, number, code):
    open('prompts.txt', 'w').write('abc\na\nabcd')
    options = ['--prompts=prompts.txt', '--num_samples=3', '--out=results.json', '--dtype=float32']
    slow = "import engine, time; draw = engine.Sampling.draw; say = lambda: print('one more', flush=True)\n" \
           "engine.Sampling.draw = lambda *inputs: (say(), time.sleep(0.01), draw(*inputs))[2]\n" \
           "engine.GPT.texts_in_memory = lambda model, length: 1"   # one after the other
    run = processes(1, 'sample.py', *SHORT, *options, patch=slow)
    run.wait_for('one more\n' * 27)   # of 6 each: the fifth is not finished
    run.kill(number)
    assert run.wait() == [code] and 'Traceback' not in run.text()
    half = results()
    script('sample.py', *SHORT, *options)
    whole = results()
    numbers = [len(each['samples']) for each in half['results']]
    assert not half['complete'] and whole['complete'] and numbers[0] == 3 and 1 <= numbers[1] <= 3 and sum(numbers) < 9
    for some, every in zip(half['results'], whole['results'], strict=True):
        assert some['samples'] == every['samples'][:len(some['samples'])] and some['prompt'] == every['prompt']


@pytest.mark.slow
def test_results_are_written_when_nobody_reads_the_messages(trained):
    command = [sys.executable, os.path.join(ROOT, 'sample.py'), *SHORT, '--out=results.json']
    run = subprocess.Popen(command, stderr=subprocess.PIPE)
    run.stderr.readline()
    run.stderr.close()
    run.wait()
    assert results()['complete'] and len(results()['results'][0]['samples']) == 2


def test_older_results_stay_when_nothing_is_sampled(trained, fails):
    open('results.json', 'w').write('precious')
    fails('sample.py', *SHORT, '--out=results.json', '--quantize=int4')
    assert open('results.json').read() == 'precious'


def test_results_that_cannot_be_written_fail_before_the_work(trained, fails, monkeypatch):
    calls = []
    monkeypatch.setattr('engine.stream', lambda *inputs, **options: calls.append(1) or iter([]))
    assert 'no/folder' in fails('sample.py', *SHORT, '--out=no/folder/results.json')[1] and calls == []


# ---- for a person

def test_a_conversation_needs_no_new_line_in_the_vocabulary(here, script, capsys, monkeypatch):
    from checkpoint import save
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(8, 3, 1, 1, 8))
    save('out/ckpt.pt', {'model': model.state_dict(), 'model_args': model.config.model_args(),
                         'tokenizer': {'name': 'char', 'chars': 'abc'}})
    monkeypatch.setattr('sys.stdin', io.StringIO('ab\n'))
    with pytest.raises(SystemExit, match='0'):
        script('sample.py', *SHORT, '--interactive=True')
    assert len(capsys.readouterr().out) == 7


def test_a_model_that_is_spoiled(trained, fails):
    spoiled = torch.load('out/ckpt_best.pt', weights_only=True)
    spoiled['model']['transformer.ln_f.weight'][0] = torch.nan
    torch.save(spoiled, 'out/ckpt_best.pt')
    assert "logits are not finite" in fails('sample.py', *SHORT)[1]


def test_speed_is_told_on_stderr(trained, script, capsys, monkeypatch):
    """ 20 milliseconds a step and 6 steps of two rows """
    draw = engine.Sampling.draw
    monkeypatch.setattr(engine.Sampling, 'draw', lambda *inputs: (time.sleep(0.02), draw(*inputs))[1])
    script('sample.py', *SHORT)
    found = re.search(r'\n12 tokens in ([\d.]+) s, ([\d,]+) tok/s, the first after ([\d.]+) s\n$',
                      capsys.readouterr().err)
    seconds, rate, first = map(float, found.groups())
    assert seconds >= 0.12 and 0.02 <= first < seconds - 0.08 and rate == pytest.approx(12 / seconds, rel=0.1)


def test_a_conversation(trained, script, capsys, monkeypatch):
    """ one continuation of each line; what cannot be encoded is said, and it goes on """
    monkeypatch.setattr('sys.stdin', io.StringIO('abc\naZ\nab\n'))
    with pytest.raises(SystemExit, match='0'):
        script('sample.py', *SHORT, '--interactive=True')
    out, err = capsys.readouterr()
    said, expected = out.split('\n'), []
    for start, seed in (('abc', 1337), ('ab', 1339)):
        script('sample.py', *SHORT, f'--start={start}', f'--seed={seed}', '--num_samples=1')
        expected.append(texts(capsys)[0][len(start):])
    assert out == ''.join(text + '\n' for text in expected) and said[0] != said[1]
    assert "not in the vocabulary: 'Z'" in err


@pytest.mark.slow
def test_a_single_text_comes_as_it_is_made_on_a_terminal(trained):
    """ piece by piece, in nanoGPT's format, and nothing of a stop; a pipe gets the same """
    command = [sys.executable, os.path.join(ROOT, 'sample.py'), *SHORT, '--num_samples=1', '--max_new_tokens=40',
               '--start=abc', '--stop=gg', '--temperature=3']
    expected = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    slow = "import engine, time, runpy, sys; draw = engine.Sampling.draw; sys.argv = sys.argv[1:]; " \
           "engine.Sampling.draw = lambda *inputs: (time.sleep(0.02), draw(*inputs))[1]; " \
           "runpy.run_path(sys.argv[0], run_name='__main__')"
    terminal, end = pty.openpty()
    run = subprocess.Popen([sys.executable, '-c', slow, *command[1:]], stdout=end, stderr=subprocess.PIPE,
                           env={**os.environ, 'PYTHONPATH': ROOT})
    os.close(end)
    pieces = []
    with contextlib.suppress(OSError):   # how a terminal ends on Linux
        while piece := os.read(terminal, 1000):
            pieces.append(piece)
    run.communicate()
    assert b''.join(pieces).decode().replace('\r\n', '\n') == expected and run.returncode == 0
    assert len(pieces) > len(expected) / 2
