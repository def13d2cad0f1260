""" data/corpus.py and the prepare.py of every folder: real files in, token files out. """
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, records
from hypothesis import given, settings
from hypothesis import strategies as st

import corpus
from corpus import Piece, Report, clean, find_files, read_documents, read_text, write_corpus
from dataset import BPE_FILES, BPETokenizer, CharTokenizer, open_dataset

GPT2 = BPETokenizer('gpt2')


def texts(paths, **options):
    return [piece.text for piece in read_documents(paths, Report(), **options)]


def write(name, content):
    os.makedirs(os.path.dirname(name) or '.', exist_ok=True)
    with open(name, 'wb') as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return name


def decoded(name, tokenizer=GPT2):
    meta, splits = open_dataset(name)
    return {split: tokenizer.decode(data.array()) for split, data in splits.items()}


@pytest.fixture
def prepare(here, script, capsys, monkeypatch):
    """ prepare('text', '--key=value') runs a copy of data/text/prepare.py that writes into this folder's data/ """
    def run(name, *options):
        target = os.path.join('data', name)
        os.makedirs(target, exist_ok=True)
        with open(os.path.join(ROOT, target, 'prepare.py'), encoding='utf-8') as file:
            source = file.read().replace("os.path.join(folder, '..', '..'), os.path.join(folder, '..')", "")
        write(os.path.join(target, 'prepare.py'), source)
        script(os.path.abspath(os.path.join(target, 'prepare.py')), *options)
        return capsys.readouterr().out
    return run


# ---- tokenizers

@pytest.mark.parametrize('name, ids', [
    ('gpt2', [15496, 2159]), ('cl100k_base', [9906, 4435]), ('o200k_base', [13225, 5922])])
def test_known_tokens(name, ids):
    assert BPETokenizer(name).encode('Hello World').tolist() == ids


@pytest.mark.parametrize('name', BPE_FILES)
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=['Cs'])))
def test_round_trips_of_all_of_unicode(name, text):
    tokenizer = BPETokenizer(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and ids.dtype == np.uint32 and (ids < tokenizer.vocab_size).all()
    chars = CharTokenizer(sorted(set(text)))
    assert chars.decode(chars.encode(text)) == text


def test_half_a_character_becomes_a_replacement():
    assert GPT2.decode(GPT2.encode('a\ud800b')) == 'a\ufffdb'


def test_a_large_vocabulary_takes_32_bits(prepare):
    write('a.txt', 'first line\nsecond line\n' * 50)
    prepare('text', '--source=a.txt', '--name=large', '--tokenizer=o200k_base')
    meta, splits = open_dataset('large')
    assert meta['dtype'] == 'uint32' and os.path.getsize('data/large/val.bin') == 4 * len(splits['val'])
    assert splits['val'].array().max() == 199999


def test_training_pads_the_vocabulary(prepare, script, capsys):
    write('a.txt', 'first line\nsecond line\n' * 50)
    prepare('text', '--source=a.txt', '--name=tiny', '--tokenizer=cl100k_base')
    state = script('train.py', *TINY, '--max_iters=1')
    assert state['model'].config.vocab_size == 100288


# ---- reading

@pytest.mark.parametrize('content, text', [
    ('one\ntwo', 'one\ntwo'), (b'\xef\xbb\xbfone\r\ntwo', 'one\ntwo'), ('caf\u00e9'.encode('cp1252'), 'caf\u00e9'),
    ('\u6f22'.encode('utf-16'), '\u6f22'), (b'PNG\0\0\1', None), (b'\x81\x8d', None), ('', '')])
def test_encodings(here, content, text):
    report = Report()
    pieces = list(read_text(write('a.txt', content), report))
    assert [piece.text for piece in pieces] == ([] if text is None else [text])
    assert report['files that are no text, left out'] == (text is None)
    assert report['files that are not UTF-8, read as Windows-1252'] == (content == b'caf\xe9')


@pytest.mark.parametrize('name', BPE_FILES)
def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(here, monkeypatch, name):
    """ cut between two words or two lines, where no token of any of them goes across """
    monkeypatch.setattr(corpus, 'PIECE', 500)
    text = open(os.path.join(ROOT, 'LOG.md')).read() + '\n\n  indented\n\n\n\tx = 1\n' * 50 + '\u6f22\u5b57\n' * 99
    text += '\n\n'.join(f'\u3000\u3000\u8fd9\u662f\u7b2c{i}\u6bb5\uff0c\u5b83\u5f88\u957f\u3002' for i in range(200))
    pieces, tokenizer = list(read_text(write('a.txt', text), Report())), BPETokenizer(name)
    assert len(pieces) > 20 and ''.join(piece.text for piece in pieces) == text
    assert [piece.first for piece in pieces].count(True) == [piece.last for piece in pieces].count(True) == 1
    cut = np.concatenate([tokenizer.encode(piece.text) for piece in pieces])
    assert np.array_equal(cut, tokenizer.encode(text)) and sum(p.size for p in pieces) == len(text.encode())


def test_long_documents_stay_whole(here, monkeypatch):
    """ files that begin in the same way are no duplicates, and one that is there twice is left out as a whole """
    monkeypatch.setattr(corpus, 'PIECE', 500)
    for i in range(5):
        header = ''.join(f'line {n} of the header\n' for n in range(200))
        write(f's/{i}.txt', header + f'and the end of file {i // 2}\n')
    report = Report()
    kept = ''.join(piece.text for piece in clean(read_documents(find_files('s', '.txt'), report), report))
    assert kept == ''.join(open(f's/{i}.txt').read() for i in (0, 2, 4))
    assert report['documents'] == 5 and report['exact duplicates, left out'] == 2


@pytest.mark.parametrize('text, count', [
    ('Le caf\u00e9 fran\u00e7ais \u00e9t\u00e9.\n' * 9, 'files with bytes that are no UTF-8, which were dropped'),
    ('\u6f22\u5b57\n' * 30, 'files with bytes that are no UTF-8, which were dropped'),
    ('a \ufffd that was there before \u00e9\n', '')])
def test_a_stray_byte_costs_a_byte(here, text, count):
    report = Report()
    assert texts([write('a.txt', text.encode() + (b'\xe9' if count else b''))]) == [text]
    list(read_text('a.txt', report))
    assert [what for what, number in report.items() if number] == [count] * bool(count)


def test_a_long_run_of_blanks(here):
    """ is too much for a regular expression of tiktoken in one piece """
    text = 'before' + ' ' * 1_000_000 + 'after'
    assert GPT2.decode(corpus._ids(GPT2, text)) == text
    write_corpus('data/mine', GPT2, [Piece([(text, True)]), Piece([('other text', True)])], Report(), val_fraction=0.5)
    assert decoded('mine')['train'] == text + '<|endoftext|>'


def test_only_files_are_read(here):
    write('s/a.txt', 'text')
    os.symlink('nowhere', 's/broken.txt')
    os.mkfifo('s/pipe.txt')
    os.makedirs('s/folder.txt')
    assert find_files('s', '.txt') == [os.path.join('s', 'a.txt')]


def test_a_line_without_end_is_read_too(here, monkeypatch):
    monkeypatch.setattr(corpus, 'PIECE', 100)
    found = texts([write('a.txt', 'x' * 5000)])
    assert ''.join(found) == 'x' * 5000 and 2 <= len(found) <= 3


def test_files_are_found_in_order_and_build_folders_are_not(here):
    for name in ('b.txt', 'a.md', 'x/c.txt', '.git/d.txt', 'build/e.txt', '.hidden.txt', 'f.png'):
        write(os.path.join('s', name), 'text')
    found = find_files('s', '.txt, .md', skip=lambda name: name == 'build')
    assert [os.path.relpath(path, 's') for path in found] == ['a.md', 'b.txt', os.path.join('x', 'c.txt')]


def test_jsonl(here):
    write('a.jsonl', '{"text": "one"}\n\n{"prompt": "2+2=", "completion": "4"}\n'
          '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n')
    pieces = list(read_documents(['a.jsonl'], Report()))
    assert [piece.parts for piece in pieces] == [
        [('one', True)], [('2+2=', False), ('4', True)],
        [('user: ', False), ('Hi\n', False), ('assistant: ', False), ('Hello\n', True)]]


@pytest.mark.parametrize('line', ['{"text": ', '[1]', '{"text": 1}', '{"prompt": "a"}', '{"messages": []}', 'NaN',
                                  '{"messages": [{"role": "user"}]}', '{"text": null}', '\ufffd', '[' * 100_000])
def test_a_bad_line_is_named_or_skipped(here, line, capsys):
    write('a.jsonl', '{"text": "one"}\n' + line + '\n{"text": "two"}\n')
    with pytest.raises(SystemExit, match='a.jsonl, line 2: .*--on_bad=skip'):
        texts(['a.jsonl'])
    report = Report()
    assert [piece.text for piece in read_documents(['a.jsonl'], report, on_bad='skip')] == ['one', 'two']
    assert report['bad lines, left out'] == 1


def test_a_line_that_is_too_long(here, monkeypatch):
    monkeypatch.setattr(corpus, 'LARGEST', 100)
    write('a.jsonl', json.dumps({'text': 'x' * 100}))
    with pytest.raises(SystemExit, match='more than 100 bytes'):
        texts(['a.jsonl'])


@pytest.mark.slow
def test_parquet_through_datasets(here):
    import datasets
    datasets.Dataset.from_dict({'text': ['one', None, 'two'] * 700, 'n': list(range(2100))}).to_parquet('a.parquet')
    report = Report()
    found = [piece.text for piece in read_documents(['a.parquet'], report)]
    assert found == ['one', 'two'] * 700 and report['rows without text, left out'] == 700
    content = bytearray(open('a.parquet', 'rb').read())
    content[20:60] = bytes(40)
    with pytest.raises(SystemExit, match=r'damaged \[1\].parquet: '):
        texts([write('damaged [1].parquet', bytes(content))])
    with pytest.raises(SystemExit, match="no column 'body', there are text, n"):
        texts(['a.parquet'], field='body')
    with pytest.raises(SystemExit, match='cannot read b.parquet'):
        texts([write('b.parquet', 'no table')])


@pytest.mark.slow
def test_parquet_with_answers(here):
    """ prompt and completion, or messages, as in JSONL """
    import datasets
    datasets.Dataset.from_dict({'n': [1], 'prompt': ['ask'], 'completion': ['answer']}).to_parquet('a.parquet')
    talk = [{'role': 'user', 'content': 'ask'}, {'role': 'assistant', 'content': 'answer'}]
    datasets.Dataset.from_dict({'messages': [talk]}).to_parquet('b.parquet')
    assert [piece.parts for piece in read_documents(['a.parquet', 'b.parquet'], Report())] == [
        [('ask', False), ('answer', True)],
        [('user: ', False), ('ask\n', False), ('assistant: ', False), ('answer\n', True)]]


# ---- quality

def test_cleaning_counts_what_it_does():
    documents = ['a text that is long enough', 'a text that is long enough', '', ' \n', 'short',
                 'with\0null\x1b and so on, more',
                 'lost \ufffd character in the middle', 'half \ud800 of a character']
    report = Report()
    left = [piece.text for piece in clean((Piece([(text, True)]) for text in documents), report)]
    assert left == ['a text that is long enough', 'short', 'withnull and so on, more',
                    'lost \ufffd character in the middle']
    assert {what: number for what, number in report.items() if number} == {
        'documents': 8, 'exact duplicates, left out': 1, 'empty documents, left out': 2,
        'documents shorter than 20 characters': 1, 'documents with control characters, which were removed': 1,
        'documents with U+FFFD, where an earlier program lost characters': 1,
        'documents with halves of characters, left out': 1}


def test_blanks_and_line_ends_are_no_control_characters():
    assert [piece.text for piece in clean([Piece([('a\tb\r\nc\fd', True)])], Report())] == ['a\tb\r\nc\fd']


def test_a_long_document_is_counted_once(here, monkeypatch):
    monkeypatch.setattr(corpus, 'PIECE', 500)
    write('a.txt', 'words\x07 and \ufffd more\n' * 200)
    report = Report()
    assert len(list(clean(read_documents(['a.txt'], report), report))) > 3
    assert {*report.values()} == {1, 0} or {*report.values()} == {1}


def test_what_follows_an_empty_beginning_is_not_taken_for_a_duplicate(here):
    """ the third text begins with blank lines, after a duplicate; its end is for validation """
    write('1.txt', 'the same\n' * 99)
    write('2.txt', 'the same\n' * 99)
    write('3.txt', '\n' * 950 + 'the end of three\n' * 4)
    report = Report()
    pieces = [piece for path in ('1.txt', '2.txt', '3.txt') for piece in corpus.read_text_with_val(path, report, 0.05)]
    left = ''.join(piece.text for piece in clean(pieces, report))
    assert left.count('the end of three') == 4 and report['exact duplicates, left out'] == 1
    assert not report['empty documents, left out']


def test_the_end_of_a_long_text_tells_it_from_another(here):
    for name in 'ab':
        write(f'{name}.txt', 'the same words\n' * 150_000 + name)
    report = Report()
    assert sum(piece.first for piece in clean(read_documents(['a.txt', 'b.txt'], report), report)) == 2


@pytest.mark.parametrize('good, bad, lost', [(8, 2, True), (2, 2, False)])
def test_few_broken_bytes_are_dropped_and_many_are_another_encoding(here, good, bad, lost):
    report = Report()
    content = ('\u00e4' * good).encode() + b'\xe4 ' * bad
    text, = [piece.text for piece in read_text(write('a.txt', content), report)]
    assert (text == '\u00e4' * good + ' ' * bad) == lost and ('Windows-1252' in ''.join(report)) != lost


def test_duplicates_are_found_among_many(monkeypatch):
    """ more than are kept in a set """
    monkeypatch.setattr(corpus, 'RECENT', 2**16)
    numbers = [*range(70_000), *range(70_000, 80_000), *range(70_000)]
    report = Report()
    left = list(clean((Piece([(f'document number {i}', True)]) for i in numbers), report))
    assert len(left) == 80_000 and report['exact duplicates, left out'] == 70_000


def test_a_long_document_is_a_duplicate_as_a_whole():
    one = [Piece([('same\n', True)], last=False), Piece([('same\n', True)], first=False)]
    other = [Piece([('same\n', True)], last=False), Piece([('other\n', True)], first=False)]
    report = Report()
    assert ''.join(piece.text for piece in clean([*one, *one], report)) == 'same\nsame\n'
    assert report['documents'] == 2 and report['exact duplicates, left out'] == 1
    assert len(list(clean(other, Report()))) == 2


def test_one_line_is_enough(prepare):
    """ it is cut where its tenth for validation begins """
    write('a.txt', 'word and more ' * 500 + '\n')
    prepare('text', '--source=a.txt', '--name=mine')
    splits = decoded('mine')
    assert len(splits['val']) == pytest.approx(700, abs=20)


def test_near_duplicates_are_counted():
    words = [f'word{i}' for i in range(200)]
    documents = [' '.join(words), ' '.join([*words[:-1], 'else']), ' '.join(words[::-1])]
    report = Report()
    assert len(list(corpus.near_duplicates((Piece([(text, True)]) for text in documents), report))) == 3
    assert report['near duplicates of an earlier document, kept'] == 1


# ---- writing

def test_documents_end_with_end_of_text_and_none_is_on_both_sides(here, capsys):
    pieces = [Piece([(f'document number {i} of many.', True)]) for i in range(95)]
    write_corpus('data/mine', GPT2, pieces, Report(), val_fraction=0.1)
    splits = decoded('mine')
    documents = {split: text.split('<|endoftext|>')[:-1] for split, text in splits.items()}
    assert sorted(sum(documents.values(), [])) == sorted(piece.text for piece in pieces)
    assert len(documents['val']) in (9, 10) and documents['val'] != [pieces[i].text for i in range(9, 95, 10)]
    first = open('data/mine/train.bin', 'rb').read()
    write_corpus('data/mine', GPT2, pieces, Report(), val_fraction=0.1, num_proc=3)
    assert open('data/mine/train.bin', 'rb').read() == first
    out = capsys.readouterr().out
    for line in ('documents that stay', 'characters per token', 'vocabulary used', 'five of them', 'longest document'):
        assert line in out


def test_an_end_of_text_in_a_text_is_no_end(here):
    """ its letters are not the token, whatever else is in the batch """
    pieces = [Piece([(f'document {i} writes <|endoftext|> out' if i % 7 == 0 else f'document {i} does not', True)])
              for i in range(50)]
    write_corpus('data/mine', GPT2, pieces, Report(), val_fraction=0.1)
    _, splits = open_dataset('mine')
    assert sum((data.array() == 50256).sum() for data in splits.values()) == 50
    assert ''.join(decoded('mine').values()).count('<|endoftext|>') == 58


def test_long_documents_in_small_batches(here, monkeypatch, capsys):
    """ each of several pieces in several batches: one end, one side, one length """
    monkeypatch.setattr(corpus, 'PIECE', 500)
    monkeypatch.setattr(corpus, 'BATCH', 700)
    names = [write(f'{i}.txt', f'document{i} says this\n' * 150) for i in range(10)]
    write_corpus('data/mine', GPT2, read_documents(names, report := Report()), report, val_fraction=0.3)
    splits = decoded('mine')
    assert ''.join(splits.values()).count('<|endoftext|>') == 10
    for i in range(10):
        assert sorted(text.count(f'document{i} ') for text in splits.values()) == [0, 150]
    assert 'longest document, characters  3,000' in capsys.readouterr().out


def test_answers_after_a_million_tokens_without_a_question(here, monkeypatch):
    """ the mask, begun late, says that all before is to be learned """
    pieces = [Piece([('a ' * 150_000 + str(i), True)]) for i in range(16)]
    pieces += [Piece([(f'question {i} ', False), ('answer', True)]) for i in range(20)]
    write_corpus('data/mine', CharTokenizer(sorted({*'a 0123456789questionanswer'})), pieces, Report(), eot=False)
    for split in ('train', 'val'):
        mask = np.fromfile(f'data/mine/{split}.mask.bin', np.uint8)
        ids = np.fromfile(f'data/mine/{split}.bin', '<u2')
        assert len(mask) == len(ids) > 2**18 and mask[:300_000].all() and not mask.all()


def test_each_thread_has_a_tokenizer_of_its_own(here, monkeypatch):
    used, encode = set(), corpus._encode

    def slow(tokenizer, *rest):   # so that one thread cannot do it all
        time.sleep(0.01)
        used.add(tokenizer.bpe)
        return encode(tokenizer, *rest)
    monkeypatch.setattr(corpus, 'BATCH', 50)
    monkeypatch.setattr(corpus, '_encode', slow)
    write_corpus('data/mine', GPT2, [Piece([(f'document number {i}', True)]) for i in range(99)], Report(), num_proc=3)
    assert 1 < len(used) <= 3 and GPT2.bpe not in used


def test_the_seed_chooses_the_documents_of_val(here):
    pieces, found = [Piece([(f'document {i}.', True)]) for i in range(200)], []
    for seed in (1, 1, 2):
        write_corpus('data/mine', GPT2, pieces, Report(), seed=seed)
        found.append(decoded('mine')['val'])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize('fraction', [0.5, 0.4, 0.35, 0.15, 0.1, 0.0005])
def test_the_share_of_val_is_the_one_that_was_wanted(fraction):
    drawn = [split for split, _ in zip(corpus._lottery(fraction, 1), range(20_000), strict=False)]
    assert drawn.count('val') == pytest.approx(20_000 * fraction, abs=2) and drawn[1] == 'val'


def test_the_five_that_are_shown_are_drawn_from_all():
    look = corpus._Look(1)
    list(look(Piece([(str(i), True)]) for i in range(1000)))
    assert len({*look.sample}) == 5 and max(map(int, look.sample)) > 100


def test_the_limit_counts_what_stays(here, capsys):
    pieces = [Piece([('ten times the same document', True)])] * 10
    pieces += [Piece([(f'document number {i} of many', True)]) for i in range(30)]
    write_corpus('data/mine', GPT2, pieces, report := Report(), limit=20)
    assert sum(text.count('<|endoftext|>') for text in decoded('mine').values()) == 20 and report['documents'] == 29


def test_limit_and_dry_run(here, capsys):
    pieces = [Piece([(f'document number {i} of many.', True)]) for i in range(95)]
    write_corpus('data/mine', GPT2, pieces, Report(), val_fraction=0.1, limit=20, dry_run=True)
    assert not os.path.exists('data/mine') and 'documents that stay' in capsys.readouterr().out
    write_corpus('data/mine', GPT2, pieces, Report(), val_fraction=0.1, limit=20)
    assert sum(text.count('<|endoftext|>') for text in decoded('mine').values()) == 20


@pytest.mark.parametrize('number', [2, 3, 5, 9, 11])
def test_two_documents_are_enough(here, number):
    write_corpus('data/mine', GPT2, [Piece([(f'document {i}', True)]) for i in range(number)], Report())
    splits = decoded('mine')
    assert splits['val'].startswith('document 1<') and splits['train'].count('document') >= number - 2


def test_something_must_be_learned(here):
    pieces = [Piece([('question ', False), ('', True)]), Piece([('only a question', False)]), Piece([('text', True)])]
    with pytest.raises(SystemExit, match='no token of val is to be learned'):
        write_corpus('data/mine', GPT2, pieces, Report())


def test_impossible_numbers(here):
    for option in ('num_proc', 'limit'):
        with pytest.raises(SystemExit, match=f'--{option}=-1'):
            write_corpus('data/mine', GPT2, [Piece([('text', True)])] * 3, Report(), **{option: -1})


def test_too_few_documents_and_impossible_fractions(here):
    for fraction, words in ((0.1, 'no document is left for val'), (0.0, '--val_fraction=0.0'),
                            (0.6, '--val_fraction=0.6')):
        with pytest.raises(SystemExit, match=words):
            write_corpus('data/mine', GPT2, [Piece([('a text that is long', True)])], Report(), val_fraction=fraction)
    assert not os.path.exists('data/mine')


def test_a_full_disk_leaves_nothing(here, monkeypatch):
    def full(self, ids, learn):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(corpus._Output, 'add', full)
    with pytest.raises(OSError):
        write_corpus('data/mine', GPT2, [Piece([(f'document {i}', True)]) for i in range(99)], Report())
    assert not os.path.exists('data/mine')


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_leaves_the_old_dataset(here):
    """ what is still in Python's buffers when all is done fits no more: nothing gets its name """
    write_corpus('data/mine', GPT2, [Piece([(f'old document {i}', True)]) for i in range(400)], Report())
    before = {name: open(f'data/mine/{name}', 'rb').read() for name in sorted(os.listdir('data/mine'))}
    code = "import resource, signal, sys; sys.path[:0] = sys.argv[1:]; import corpus, dataset\n" \
           "tokenizer = dataset.BPETokenizer('gpt2')\n" \
           "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" \
           "resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))\n" \
           "pieces = [corpus.Piece([(f'document {i}', True)]) for i in range(400)]\n" \
           "corpus.write_corpus('data/mine', tokenizer, pieces, corpus.Report())"
    run = subprocess.run([sys.executable, '-c', code, ROOT, os.path.join(ROOT, 'data')], capture_output=True, text=True)
    assert run.returncode and 'File too large' in run.stderr
    assert {name: open(f'data/mine/{name}', 'rb').read() for name in sorted(os.listdir('data/mine'))} == before


def test_an_interruption_is_one_line(here, capsys):
    def pieces():
        yield Piece([('document', True)])
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        write_corpus('data/mine', GPT2, pieces(), Report())
    assert stop.value.code == 130 and capsys.readouterr().err.splitlines()[-1] == 'interrupted, nothing was written'
    assert not os.path.exists('data/mine')


@pytest.mark.slow
def test_a_kill_leaves_no_file_that_looks_whole(here):
    code = "import sys, time; sys.path[:0] = sys.argv[1:]; import corpus, dataset\n" \
           "def pieces():\n" \
           "    for i in range(10**6):\n" \
           "        yield corpus.Piece([(f'{i} ' + 'word ' * 99, True)])\n" \
           "corpus.write_corpus('data/mine', dataset.BPETokenizer('gpt2'), pieces(), corpus.Report())"
    run = subprocess.Popen([sys.executable, '-c', code, ROOT, os.path.join(ROOT, 'data')])
    while not os.path.exists('data/mine/train.bin.tmp') or os.path.getsize('data/mine/train.bin.tmp') < 2**20:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert sorted(os.listdir('data/mine')) == ['train.bin.tmp', 'val.bin.tmp']
    write_corpus('data/mine', GPT2, [Piece([(f'document {i}', True)]) for i in range(99)], Report())
    assert sorted(os.listdir('data/mine')) == ['meta.json', 'train.bin', 'val.bin']


# ---- masks

@pytest.fixture
def masked(here):
    """ answers to learn, of one or several tokens, and texts without a question """
    pieces = [Piece([(f'Question {i}? ', False), (f'Answer {i * i}.', True)]) for i in range(80)]
    pieces[20:20] = [Piece([(f'All of text {i}.', True)]) for i in range(20)]
    write_corpus('data/tiny', GPT2, pieces, Report(), val_fraction=0.1)
    return open_dataset('tiny')


def test_masks_line_up_with_targets(masked):
    """ in every window: what is a target is an answer or an end of text, and inputs are the tokens as they are """
    meta, splits = masked
    assert sorted(meta['tokens']) == ['train', 'train.mask', 'val', 'val.mask']
    for name, data in splits.items():
        ids, mask = data.array().astype(int), np.fromfile(f'data/tiny/{name}.mask.bin', np.uint8)
        assert len(ids) == len(mask) == len(data) and 0 < mask.mean() < 1
        learned = GPT2.decode(ids[mask == 1])
        assert 'Question' not in learned and learned.count('<|endoftext|>') == (ids == 50256).sum()
        assert learned.count('Answer') == GPT2.decode(ids).count('Answer')
        expected = torch.from_numpy(np.where(mask, ids, -1 - ids))
        rows = data.rows(np.arange(len(ids) - 8), 8)
        assert torch.equal(rows, expected.unfold(0, 9, 1))
        swept = torch.cat([data.sweep_batch(3, 8, k) for k in range(data.sweep_length(3, 8))])
        assert torch.equal(swept[:, 1:].flatten()[:len(ids) - 1], expected[1:])
        for step in range(50):
            assert (data.batch(4, 3, 1, 'train', step)[:, 1:] >= 0).any(dim=1).all()


def test_training_learns_the_answers_only(masked, script, capsys):
    """ the loss that is logged is that of the answers, and evaluation counts them only """
    state = script('train.py', *TINY, '--max_iters=2', '--eval_iters=0')
    x, y = state['to_device'](masked[1]['val'].sweep_batch(2, 8, 0))
    assert (x >= 0).all() and (y == -1).any() and (y >= -1).all()
    model, losses = state['model'].eval(), []
    data = masked[1]['val']
    with torch.no_grad():
        for k in range(data.sweep_length(1, 8)):
            x, y = state['to_device'](data.sweep_batch(1, 8, k))
            logits = model(x, y)[0].log_softmax(-1)
            losses += [-logits[0, t, y[0, t]].item() for t in range(8) if y[0, t] >= 0]
    assert state['evaluate']('val')[0] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.slow
def test_masked_losses_are_those_of_one_process(masked, processes):
    """ also where the rows of a batch, with unequal numbers of targets, are dealt out to two """
    options = [*TINY, '--max_iters=5', '--batch_size=4', '--gradient_accumulation_steps=1', '--eval_interval=5',
               '--log_interval=1', '--dropout=0.0']
    losses = []
    for world_size in (1, 2):
        run = processes(world_size, 'train.py', *options, f'--out_dir=out{world_size}')
        assert run.wait() == [0] * world_size, run.text()
        losses.append([record['loss'] for record in records('loss', f'out{world_size}/log.jsonl')])
    assert len(losses[0]) >= 5 and losses[0] == pytest.approx(losses[1], abs=2e-6)


def test_a_mask_that_does_not_fit_is_refused(masked):
    os.truncate('data/tiny/train.mask.bin', 10)
    with pytest.raises(SystemExit, match='train.mask.bin: 10 tokens'):
        open_dataset('tiny')
    os.remove('data/tiny/train.mask.bin')
    with pytest.raises(SystemExit, match='train.mask.bin: 0 bytes'):
        open_dataset('tiny')


# ---- every prepare.py

def test_shakespeare_in_gpt2s_tokens(prepare, monkeypatch):
    """ nanoGPT's numbers """
    os.makedirs('data/shakespeare')
    os.symlink(os.path.join(ROOT, 'data', 'shakespeare_char', 'input.txt'), 'data/shakespeare/input.txt')
    out = prepare('shakespeare')
    meta, splits = open_dataset('shakespeare')
    assert meta['tokens'] == {'train': 301966, 'val': 36059} and '301,966' in out
    assert GPT2.decode(splits['train'].array()[:3]) == 'First Citizen:' and splits['train'].array().max() < 50256


def test_a_text_of_ones_own(prepare):
    """ a single file: its end is for validation, up to a line; some more: the end of each """
    lines = ''.join(f'line {i}\n' for i in range(100))
    prepare('text', f'--source={write("book.txt", lines)}', '--name=book')
    splits = decoded('book')
    ends = [text.endswith('\n<|endoftext|>') and text.count('<|endoftext|>') == 1 for text in splits.values()]
    assert ends == [True, True] and (splits['train'] + splits['val']).replace('<|endoftext|>', '') == lines
    assert 0.08 < len(splits['val']) / len(lines) < 0.12
    write('more/a.txt', lines), write('more/b.md', lines.replace('line', 'verse')), write('more/c.png', 'x')
    prepare('text', '--source=more', '--name=more', '--tokenizer=char')
    meta, data = open_dataset('more')
    assert meta['tokenizer']['name'] == 'char' and meta['vocab_size'] == len(set(lines + 'verse'))
    text = CharTokenizer(meta['tokenizer']['chars']).decode(data['val'].array())
    assert 'line 99' in text and 'verse 99' in text and 'line 50' not in text


@pytest.mark.parametrize('text', ['a long line without end ' * 200, 'one\ntwo\n' * 2000, 'x\n' * 50 + 'y' * 5000])
def test_the_end_of_a_long_text_is_for_validation(here, monkeypatch, text):
    """ also where the border is in one of many pieces, or in a line that goes on to the end """
    monkeypatch.setattr(corpus, 'PIECE', 500)
    pieces = list(corpus.read_text_with_val(write('a.txt', text), Report(), 0.1))
    parts = {split: ''.join(piece.text for piece in pieces if piece.split == split) for split in ('train', 'val')}
    assert parts['train'] + parts['val'] == text and 0.05 < len(parts['val']) / len(text) < 0.11
    assert [piece.last for piece in pieces].count(True) == 2 and [piece.first for piece in pieces].count(True) == 1


def test_a_dataset_prepared_again_has_nothing_of_the_old_one(prepare):
    rows = [{'prompt': f'{i}+{i}=', 'completion': str(2 * i)} for i in range(60)]
    write('chats.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
    prepare('text', '--source=chats.jsonl', '--name=again', '--tokenizer=char')
    assert os.path.exists('data/again/meta.pkl') and os.path.exists('data/again/val.mask.bin')
    prepare('text', f'--source={write("book.txt", "some text" * 99)}', '--name=again')
    assert sorted(os.listdir('data/again')) == ['meta.json', 'train.bin', 'val.bin']
    assert open_dataset('again')[1]['train'].mask is None


def test_chats_of_ones_own(prepare):
    rows = [{'prompt': f'{i}+{i}=', 'completion': str(2 * i)} for i in range(60)]
    write('chats.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
    prepare('text', '--source=chats.jsonl', '--name=chats')
    assert sorted(os.listdir('data/chats')) == ['meta.json', 'train.bin', 'train.mask.bin', 'val.bin', 'val.mask.bin']


def test_code(prepare):
    for i in range(40):
        write(f'project/module{i}.py', f'def function{i}():\n    return {i}\n')
    for name in ('build/made.py', 'node_modules/x/y.py', 'a.egg-info/z.py', '.venv/w.py', 'notes.txt'):
        write(f'project/{name}', 'left = out\n')
    prepare('my_code', '--source=project')
    splits = decoded('my_code')
    assert 'left' not in ''.join(splits.values()) and len(splits['val'].split('<|endoftext|>')) == 5
    assert sum(text.count('def function') for text in splits.values()) == 40


def test_openwebtext_from_local_files(prepare):
    write('web/a.jsonl', ''.join(json.dumps({'text': f'document {i} of the web'}) + '\n' for i in range(4000)))
    prepare('openwebtext', '--source=./web')
    splits = decoded('openwebtext')
    assert splits['val'].count('<|endoftext|>') == 2 and splits['train'].count('<|endoftext|>') == 3998


@pytest.mark.slow
@pytest.mark.parametrize('options, name, revision', [
    ([], ('Skylion007/openwebtext',), '79d93d786212f7344586290adb811d4ae6a1762c'),
    (['--source=a/b', '--subset=c'], ('a/b', 'c'), 'main'), (['--source=a/b', '--revision=v1'], ('a/b',), 'v1')])
def test_openwebtext_asks_the_hub_for_a_commit(prepare, monkeypatch, options, name, revision):
    import datasets
    asked, table = [], datasets.Dataset.from_dict({'text': ['one', 'two', 'three']}).to_iterable_dataset()
    monkeypatch.setattr(datasets, 'load_dataset', lambda *source, **how: asked.append((source, how)) or table)
    prepare('openwebtext', *options)
    assert asked == [(name, {'split': 'train', 'streaming': True, 'revision': revision})]
    assert sorted(''.join(decoded('openwebtext').values()).split('<|endoftext|>')[:-1]) == ['one', 'three', 'two']


def test_openwebtext_without_network(here, fails, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert 'cannot read Skylion007/openwebtext' in fails('data/openwebtext/prepare.py', '--limit=10')[1]


def test_every_sql_statement_runs(prepare, script):
    """ the pairs are thousands, all different, and SQLite takes each statement on tables that have those columns """
    prepare('sql')
    made = script(os.path.abspath('data/sql/prepare.py'), '--dry_run=True')
    pairs = [piece.parts for piece in made['documents'](Report(), '')]
    database = sqlite3.connect(':memory:')
    for table, (numbers, words) in made['TABLES'].items():
        keys = [made['JOINS'][table] + '_id'] if table in made['JOINS'] else []
        database.execute(f"CREATE TABLE {table} ({', '.join(['id', 'name', *numbers, *words, *keys])})")
    for one in made['JOINS'].values():
        database.execute(f'CREATE TABLE {one}s (id, name)')
    for (question, _), (sql, learn) in pairs:
        assert question.startswith('# Question: ') and question.endswith('\n# SQL:\n') and learn
        database.execute(sql)
    kinds = ('JOIN', 'GROUP BY', 'HAVING', 'ORDER BY', 'COUNT', 'AVG', ' AND ', ' OR ')
    assert len(pairs) == 5000 == len({question for (question, _), _ in pairs})
    assert len({sql for _, (sql, _) in pairs}) > 4900
    assert all(sum(kind in sql for _, (sql, _) in pairs) > 100 for kind in kinds)
    _, splits = open_dataset('sql')
    assert splits['train'].mask and splits['val'].mask


@pytest.mark.parametrize('content, name', [
    ('[{"question": "How many?", "sql": "SELECT 1;"}, {"question": "Who?", "sql": "SELECT 2;"}]', 'pairs.json'),
    ('{"question": "How many?", "sql": "SELECT 1;"}\n{"question": "Who?", "sql": "SELECT 2;"}\n', 'pairs.jsonl')])
def test_sql_of_ones_own(prepare, content, name):
    write(name, content)
    prepare('sql', f'--source={name}', '--val_fraction=0.5')
    text = ''.join(decoded('sql').values())
    assert '# Question: How many?\n# SQL:\nSELECT 1;<|endoftext|>' in text and 'SELECT 2;' in text


@pytest.mark.parametrize('script_name, options, words', [
    ('text', [], '--source=FILE_OR_FOLDER --name=NAME'),
    ('text', ['--source=none', '--name=x'], '--source=none does not'),
    ('text', ['--source=folder', '--name=x'], 'has no files that end with .txt'),
    ('text', ['--source=empty.txt', '--name=x'], 'no document is left'),
    ('text', ['--source=binary.txt', '--name=x'], 'no document is left'),
    ('text', ['--source=a.txt', '--name=../x'], '--name=../x'),
    ('text', ['--source=a.txt', '--name=sql'], '--name=sql'),
    ('text', ['--source=a.txt', '--name=x', '--tokenizer=bert'], "no tokenizer 'bert'"),
    ('text', ['--source=bad.jsonl', '--name=x'], 'bad.jsonl, line 1'),
    ('text', ['--source=bad.jsonl', '--name=x', '--on_bad=ask'], '--on_bad=ask'),
    ('text', ['--source=a.txt', '--name=x', '--val_fraction=2'], '--val_fraction=2.0'),
    ('sql', ['--source=none.json'], 'none.json'), ('sql', ['--source=bad.json'], 'bad.json'),
    ('sql', ['--source=list.json'], 'list.json, line 2: wants a question and its sql'),
    ('sql', ['--source=number.json'], 'number.json'),
    ('text', ['--source=a.txt', '--name=x', '--val_fraction=0'], '--val_fraction=0.0'),
    ('sql', ['--num_pairs=0'], '--num_pairs=0'), ('my_code', ['--source=none'], '--source=none does not'),
    ('openwebtext', ['--source=./none'], '--source=./none does not')])
def test_wrong_input(here, fails, script_name, options, words):
    os.makedirs('folder')
    for name, content in (('empty.txt', ''), ('binary.txt', b'\0\1\2'), ('a.txt', 'some text\n' * 50),
                          ('bad.jsonl', '{'), ('bad.json', '['), ('number.json', '5'),
                          ('list.json', '[{"question": "a", "sql": "b"}, 7]')):
        write(name, content)
    assert words in fails(f'data/{script_name}/prepare.py', *options)[1]
    assert not os.path.exists(os.path.join(ROOT, 'data', 'x', 'train.bin'))


# ---- comparison of tokenizers

@pytest.mark.parametrize('text', ['Hello world, hello words.\n' * 20, '\u4f60\u597d\uff0c\u4e16\u754c\uff01\n' * 20])
def test_comparison(here, capsys, text):
    corpus.compare(['compare', write('a.txt', text)], ('char', *BPE_FILES))
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(rows) == ['char', *BPE_FILES]
    for name in BPE_FILES:
        assert int(rows[name][2].replace(',', '')) == len(BPETokenizer(name).encode(text))


@pytest.mark.parametrize('arguments', [[], ['compare'], ['compare', 'none.txt'], ['compare', 'empty.txt'],
                                       ['count', 'a.txt']])
def test_wrong_comparisons(here, fails, arguments):
    write('empty.txt', '')
    write('a.txt', 'text')
    fails('dataset.py', *arguments)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason="Linux tells the peak of one program there")
def test_memory_stays_the_same_for_a_larger_corpus(here):
    """ the most that a process of its own takes, for 5 MB and for 40 MB in one file of text """
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import corpus, dataset\n" \
           "report = corpus.Report()\n" \
           "corpus.write_corpus('data/mine', dataset.BPETokenizer('gpt2'), \n" \
           "    corpus.read_text_with_val(sys.argv[3], report, 0.1), report, num_proc=2)\n" \
           "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    text = open(os.path.join(ROOT, 'data', 'shakespeare_char', 'input.txt')).read()
    peaks = []
    for times in (8, 40):
        write('a.txt', ''.join(f'{i} {text}' for i in range(times)))
        done = subprocess.run([sys.executable, '-c', code, ROOT, os.path.join(ROOT, 'data'), 'a.txt'],
                              capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 10**6
