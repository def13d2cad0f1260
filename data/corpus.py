""" Documents into train.bin and val.bin: read, looked at, cleaned and tokenized in batches, in bounded memory.

    paths = find_files('my_texts', '.txt,.md,.jsonl')
    write_corpus('data/mine', BPETokenizer('gpt2'), read_documents(paths, report := Report()), report, val_fraction=0.1)

What every prepare.py below shares. The files that it writes are described, and read, in dataset.py.
"""
import copy
import glob
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import local

import numpy as np
from tqdm import tqdm

from common import atomic_write, fail, first_line, print0
from dataset import BPETokenizer, CharTokenizer, write_meta

PIECE = 2**20       # characters: a longer text is read and tokenized in pieces of about this length
BATCH = 2**19       # characters that a thread tokenizes at once
RECENT = 2**18      # hashes of documents in a set, before they join the sorted ones
LARGEST = 2**28     # bytes: the longest line of JSON
EOT = '<|endoftext|>'   # as tiktoken writes the token that ends a document
SHORT = 20          # characters: shorter documents are counted
# where no token of any tokenizer goes across: before a word, or the end of a line or sentence, or after a single line
CUT = re.compile('(?<=[^\\W\\d_])(?= [^\\W\\d_]|[\n\uff0c\u3002\uff01\uff1f])|(?<=\\S\n)(?=[^\\s/])')
CONTROL = bytes({*range(32), 127} - {*b'\t\n\r\f'})   # no text has these characters


# ---- documents

@dataclass
class Piece:
    """ a document, or a piece of a long one, as parts: (text, whether a model is to learn it) """
    parts: list[tuple[str, bool]]
    size: int = 0           # bytes of the source, for the progress bar
    first: bool = True      # of its document
    last: bool = True
    split: str = ''         # 'train' or 'val' if that is not left to chance
    key: bytes = b''        # a hash of the whole document

    @property
    def text(self) -> str:
        return ''.join(text for text, _ in self.parts)


class Report(Counter):
    """ how many documents, files or lines were found to be what """


def find_files(source: str, extensions: str, skip: Callable[[str], bool] = lambda name: False) -> list[str]:
    """ source itself if it is a file, else the files below it with these extensions; SystemExit if there are none

    Folders and files with a dot in front, and those whose name is to be skipped, are left out.
    """
    def unreadable(error):
        raise error
    if not os.path.exists(source := os.path.expanduser(source)):
        fail(f"--source={source} does not exist")
    if os.path.isfile(source):
        return [source]
    wanted, found = tuple(each.strip() for each in extensions.split(',')), []
    for folder, folders, names in os.walk(source, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith('.') and not skip(name))
        found += [os.path.join(folder, name) for name in sorted(names)
                  if name.endswith(wanted) and not name.startswith('.') and not skip(name)
                  and os.path.isfile(os.path.join(folder, name))]
    if not found:
        fail(f"--source={source} has no files that end with {' or '.join(wanted)}")
    return found


def _chunks(path: str, **options) -> Iterator[str]:
    with open(path, **options) as file:
        yield from iter(lambda: file.read(2**20), '')


def _encoding(path: str, report: Report) -> dict | None:
    """ how to open a text file: UTF-8, UTF-16 if it says so, else what is counted; None for what is no text

    Where few of many characters are broken it is UTF-8, and they are dropped; else it is Windows-1252.
    """
    with open(path, 'rb') as file:
        name = 'utf-16' if file.read(2) in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig'
    text = bad = 0
    for chunk in _chunks(path, encoding=name, errors='replace'):
        if '\0' in chunk:
            report['files that are no text, left out'] += 1
            return None
        bad += chunk.count('\ufffd')
        text += len(chunk) - len(chunk.encode('ascii', 'ignore'))   # not ASCII, the bad ones too
    for errors, what in (('strict', ''), ('ignore', 'files with bytes that are no UTF-8, which were dropped'),
                         ('cp1252', 'files that are not UTF-8, read as Windows-1252')):
        options = {'encoding': 'cp1252'} if errors == 'cp1252' else {'encoding': name, 'errors': errors}
        if errors == 'ignore' and text < 3 * bad:
            continue
        try:
            for _ in _chunks(path, **options) if bad else ():   # U+FFFD itself may stand there
                pass
        except UnicodeDecodeError:
            continue
        report[what] += bool(what)
        return options
    report['files that are no text, left out'] += 1
    return None


def _border(text: str) -> int:
    """ the last place where a text can be cut so that its tokens stay the same; 0 if there is none """
    for begin in (max(0, len(text) - 2**14), 0):
        if places := [found.start() for found in CUT.finditer(text, begin)]:
            return places[-1]
    return len(text) if len(text) > 16 * PIECE else 0   # of no language; in memory it must not grow for ever


def read_text(path: str, report: Report) -> Iterator[Piece]:
    """ a text file as one document, in pieces """
    if not (options := _encoding(path, report)):
        return
    key = hashlib.blake2b(digest_size=8)
    for chunk in _chunks(path, **options):
        key.update(chunk.encode())
    with open(path, **options) as file:
        text, first = file.read(PIECE), True
        while more := file.read(PIECE):
            if cut := _border(text):
                yield Piece([(text[:cut], True)], len(text[:cut].encode()), first, False, key=key.digest())
                first = False
            text = text[cut:] + more
    yield Piece([(text, True)], len(text.encode()), first, key=key.digest())


def read_text_with_val(path: str, report: Report, fraction: float) -> Iterator[Piece]:
    """ a text file whose end is for val: this fraction of its characters, up to where a line begins """
    border, split = int(sum(len(piece.text) for piece in read_text(path, Report())) * (1 - fraction)), 'train'
    for piece in read_text(path, report):
        text = piece.text
        if split == 'train' and 0 <= border < len(text):
            line_end = text.find('\n', border) + 1
            leaves_some = line_end < len(text) or not piece.last
            cut, split = line_end if line_end and leaves_some else border, 'val'
            yield Piece([(text[:cut], True)], piece.size, piece.first, True, 'train', piece.key)
            if text[cut:]:
                yield Piece([(text[cut:], True)], 0, False, piece.last, 'val')
        else:
            yield replace(piece, split=split)
        border -= len(text)


def parts_of(row: dict, field: str = 'text') -> list[tuple[str, bool]]:
    """ {text}, {prompt, completion} or {messages: [{role, content}]}: answers are to be learned; ValueError if none """
    row = row if isinstance(row, dict) else {}
    if isinstance(row.get(field), str):
        return [(row[field], True)]
    if isinstance(row.get('prompt'), str) and isinstance(row.get('completion'), str):
        return [(row['prompt'], False), (row['completion'], True)]
    if isinstance(messages := row.get('messages'), list) and messages:
        parts = []
        for message in messages:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ('role', 'content')):
                raise ValueError("a message wants a role and a content")
            parts += [(f"{message['role']}: ", False), (message['content'] + '\n', message['role'] == 'assistant')]
        return parts
    raise ValueError(f"no text under {field!r}, no prompt and completion, no messages")


def _check_on_bad(on_bad: str) -> None:
    if on_bad not in ('stop', 'skip'):
        fail(f"--on_bad={on_bad} is neither stop nor skip")


def read_rows(rows: Iterable, path: str, report: Report, on_bad: str = 'stop', parts: Callable = parts_of,
              size: Callable = lambda row: 0) -> Iterator[Piece]:
    """ each row a document; a bad one is named and ends it all, or is counted with on_bad='skip' """
    _check_on_bad(on_bad)
    for number, row in enumerate(rows, 1):
        try:
            if row not in (b'\n', b'\r\n'):
                yield Piece(parts(row), size(row))
        except (ValueError, RecursionError) as error:
            if on_bad == 'stop':
                fail(f"{path}, line {number}: {error}; --on_bad=skip leaves such lines out")
            report['bad lines, left out'] += 1


def read_jsonl(path: str, report: Report, on_bad: str = 'stop', parts: Callable = parts_of) -> Iterator[Piece]:
    """ each line a document """
    def parse(line):
        if len(line) == LARGEST:
            fail(f"{path} has a line of more than {LARGEST:,} bytes; split it")
        return parts(json.loads(line))
    with open(path, 'rb') as file:
        lines = file if os.path.getsize(path) < LARGEST else iter(lambda: file.readline(LARGEST), b'')
        yield from read_rows(lines, path, report, on_bad, parse, len)


def read_table(rows: Iterable[dict], report: Report, field: str = 'text') -> Iterator[Piece]:
    """ batches of columns, as datasets' iter gives them: each row a document """
    for batch in rows:
        for values in zip(*batch.values(), strict=True):
            try:
                parts = parts_of(dict(zip(batch, values, strict=True)), field)
                yield Piece(parts, sum(len(text) for text, _ in parts))
            except ValueError:
                report['rows without text, left out'] += 1


def load_table(field: str, *source, **options):
    """ a table of the datasets library, streamed, the columns that parts_of wants; SystemExit says why not """
    try:
        import datasets
        datasets.disable_progress_bars()
        table = datasets.load_dataset(*source, split='train', streaming=True, **options)
        there = table.column_names or [field]
        wanted = [names for names in ([field], ['prompt', 'completion'], ['messages']) if {*names} <= {*there}]
        if not wanted:
            raise ValueError(f"no column {field!r}, there are {', '.join(there)}; --field= chooses one")
        return table.select_columns(wanted[0]).iter(1000)
    except Exception as error:   # no network, no such name, no Parquet, ...
        fail(f"cannot read {options.get('data_files') or source[0]} ({first_line(error)})")


def size_of(paths: list[str]) -> int:
    """ bytes, for the progress bar; 0, unknown, where there is Parquet, which is compressed """
    return 0 if any(path.endswith('.parquet') for path in paths) else sum(map(os.path.getsize, paths))


def read_documents(paths: list[str], report: Report, field: str = 'text', on_bad: str = 'stop') -> Iterator[Piece]:
    """ those of all files: lines of .jsonl, rows of .parquet, any other file as a whole """
    _check_on_bad(on_bad)
    for path in paths:
        if path.endswith('.jsonl'):
            yield from read_jsonl(path, report, on_bad, partial(parts_of, field=field))
        elif path.endswith('.parquet'):
            try:
                yield from read_table(load_table(field, 'parquet', data_files=glob.escape(path)), report, field)
            except (ValueError, OSError) as error:   # in the middle of it
                fail(f"{path}: {first_line(error)}")
        else:
            yield from read_text(path, report)


# ---- quality

class _Seen:
    """ whether a 64-bit hash was there before; 8 bytes each, a chance of 3e-6 to be wrong once in ten million """

    def __init__(self):
        self.old, self.new = np.zeros(0, np.uint64), set()

    def __call__(self, number: int) -> bool:
        found = number in self.new
        if len(self.old) and not found:
            at = np.searchsorted(self.old, np.uint64(number))
            found = at < len(self.old) and int(self.old[at]) == number
        self.new.add(number)
        if len(self.new) > RECENT:
            self.old = np.union1d(self.old, np.fromiter(self.new, np.uint64, len(self.new)))
            self.new.clear()
        return found


def clean(pieces: Iterable[Piece], report: Report) -> Iterator[Piece]:
    """ the pieces without what no model should learn; all that is found is counted, once a document """
    seen, again, found = _Seen(), False, set()

    def count(what):
        report[what] += what not in found
        found.add(what)
    for piece in pieces:
        if piece.first:
            again = False
            found.clear()
            count('documents')
        try:
            content = piece.text.encode()
        except UnicodeEncodeError:   # "\\ud800" in JSON
            count('documents with halves of characters, left out')
            continue
        if len(content.translate(None, CONTROL)) < len(content):
            count('documents with control characters, which were removed')
            piece = replace(piece, parts=[(part.encode().translate(None, CONTROL).decode(), learn)
                                          for part, learn in piece.parts])
            content = piece.text.encode()
        if piece.first and piece.last and not (content if piece.split else content.strip()):
            count('empty documents, left out')
            continue
        if piece.first and piece.last and not piece.split and len(piece.text) < SHORT:
            count(f'documents shorter than {SHORT} characters')
        if '\ufffd' in piece.text:
            count('documents with U+FFFD, where an earlier program lost characters')
        if piece.first:
            key = piece.key or hashlib.blake2b(content, digest_size=8).digest()
            if again := seen(int.from_bytes(key, 'little')):
                count('exact duplicates, left out')
        if not again:
            yield piece


def near_duplicates(pieces: Iterable[Piece], report: Report) -> Iterator[Piece]:
    """ count documents that share about 80% of their runs of five words with an earlier one (MinHash); keeps them

    Of a document of several pieces the first one counts.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        fail("--near_duplicates=True needs datasketch: pip install datasketch")
    index = MinHashLSH(threshold=0.8, num_perm=64)
    for number, piece in enumerate(pieces):
        if piece.first:
            words, sketch = piece.text.split(), MinHash(num_perm=64)
            sketch.update_batch([' '.join(words[i:i + 5]).encode() for i in range(max(1, len(words) - 4))])
            report['near duplicates of an earlier document, kept'] += bool(index.query(sketch))
            index.insert(number, sketch)
        yield piece


# ---- tokens

def _lottery(fraction: float, seed: int) -> Iterator[str]:
    """ the split of one document after the other: of each run of 1 / fraction of them a random one goes to val

    Of the first ones it is the second, so that two documents are enough.
    """
    dice, begin = random.Random(seed), 0
    for number in itertools.count(1):
        end = math.ceil(number / fraction - 1e-6)
        chosen = dice.randrange(begin, end) if begin else 1
        yield from ('val' if i == chosen else 'train' for i in range(begin, end))
        begin = end


class _Output:
    """ one split on its way to the disk: ids, and from the first part on that is not to be learned, a mask """

    def __init__(self, stack: ExitStack, path: str, dtype: np.dtype, dry_run: bool):
        self.stack, self.path, self.dtype = stack, path, dtype
        self.tokens, self.learned = 0, 0
        self.sha256, self.mask, self.mask_sha256 = hashlib.sha256(), None, hashlib.sha256()
        self.file = None if dry_run else stack.enter_context(atomic_write(f'{path}.bin'))

    def add(self, ids: np.ndarray, learn: np.ndarray | None) -> None:
        if self.file and self.mask is None and learn is not None:
            self.mask = self.stack.enter_context(atomic_write(f'{self.path}.mask.bin'))
            for begin in range(0, self.tokens, 2**20):
                self._mask(b'\1' * min(2**20, self.tokens - begin))
        self.tokens += len(ids)
        self.learned += len(ids) if learn is None else int(learn.sum())
        if self.file:
            self.file.write(content := ids.astype(self.dtype))
            self.sha256.update(content)
        if self.mask:
            self._mask(np.ones(len(ids), np.uint8) if learn is None else learn)

    def sync(self) -> None:
        """ what was written is on the disk, or this is the OSError """
        for file in filter(None, (self.file, self.mask)):
            file.flush()
            os.fsync(file.fileno())

    def _mask(self, content: bytes | np.ndarray) -> None:
        self.mask.write(content)
        self.mask_sha256.update(content)


def _twin(tokenizer: BPETokenizer | CharTokenizer) -> BPETokenizer | CharTokenizer:
    """ the same for another thread: two that share tiktoken's regular expression are slower than one (cache lines) """
    if not isinstance(tokenizer, BPETokenizer):
        return tokenizer
    bpe, twin = tokenizer.bpe, copy.copy(tokenizer)
    twin.bpe = type(bpe)(bpe.name, pat_str=bpe._pat_str, mergeable_ranks=bpe._mergeable_ranks,   # as its README does
                         special_tokens=bpe._special_tokens)
    return twin


def _ids(tokenizer, text: str) -> np.ndarray:
    """ tiktoken's, in halves where a run of hundreds of thousands of blanks is too much for its regular expression """
    try:
        return tokenizer.encode(text)
    except ValueError:
        half = len(text) // 2
        if half < 2**14:
            raise
        return np.concatenate((_ids(tokenizer, text[:half]), _ids(tokenizer, text[half:])))


def _encode(tokenizer, batch: list[tuple[str, Piece]], eot: bool) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """ for each split the ids of its pieces and, where not all are to be learned, which ones are: 1, else 0 """
    if eot and all(piece.parts[0][1] and len(piece.parts) == 1 and EOT not in piece.text for _, piece in batch):
        texts = {}   # one call for all: each would wait for the thread that reads
        for split, piece in batch:
            texts.setdefault(split, []).append(piece.text + EOT * (piece.last and tokenizer.eot is not None))
        with suppress(ValueError):   # see _ids
            return {split: (tokenizer.encode(''.join(parts), special=True), None) for split, parts in texts.items()}
    found, end = {}, np.array([] if not eot or tokenizer.eot is None else [tokenizer.eot], np.uint32)
    for split, piece in batch:
        runs = found.setdefault(split, [])
        runs += [(_ids(tokenizer, text), learn) for text, learn in piece.parts]
        if piece.last:
            runs.append((end, piece.parts[-1][1]))
    return {split: (np.concatenate([ids for ids, _ in runs]), None if all(learn for _, learn in runs) else
                    np.concatenate([np.full(len(ids), learn, np.uint8) for ids, learn in runs]))
            for split, runs in found.items()}


def _batches(pieces: Iterable[Piece], splits: Iterator[str], bar: tqdm) -> Iterator[list[tuple[str, Piece]]]:
    """ (split, piece) in lists of about BATCH characters """
    batch, characters, split = [], 0, ''
    for piece in pieces:
        bar.update(piece.size)
        split = piece.split or (next(splits) if piece.first else split)
        batch.append((split, piece))
        characters += len(piece.text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    yield batch


class _Look:
    """ what a person wants to know about the documents that stay: sizes, the longest, five at random """

    def __init__(self, seed: int):
        self.dice, self.sample = random.Random(seed), []
        self.documents = self.characters = self.longest = self.length = 0

    def __call__(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            self.documents += piece.first
            self.characters += len(text := piece.text)
            self.length = len(text) + (0 if piece.first else self.length)
            self.longest = max(self.longest, self.length)
            if piece.first and len(self.sample) < 5:
                self.sample.append(text[:100])
            elif piece.first and (place := self.dice.randrange(self.documents)) < 5:
                self.sample[place] = text[:100]
            yield piece


@contextmanager
def _one_line_interrupt() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted, nothing was written", file=sys.stderr)
        raise SystemExit(130) from None


def write_corpus(folder: str, tokenizer: BPETokenizer | CharTokenizer, pieces: Iterable[Piece], report: Report, *,
                 val_fraction: float = 0.1, seed: int = 2357, num_proc: int = 0, total: int = 0, eot: bool = True,
                 limit: int = 0, near: bool = False, dry_run: bool = False) -> None:
    """ tokenize what is left of the documents after clean into folder, and print what was found

    num_proc threads (0: one for each processor); total: bytes of the source, for the progress bar; limit: documents;
    near: count near duplicates, slowly.
    Nothing stands under the final names until all is written. SystemExit if a split remains without tokens.
    """
    if not 0 < val_fraction <= 0.5:
        fail(f"--val_fraction={val_fraction} must be above 0 and at most 0.5")
    if min(num_proc, limit) < 0:
        fail(f"--num_proc={num_proc} and --limit={limit} must be at least 0")
    threads, used, look = num_proc or os.cpu_count(), np.zeros(tokenizer.vocab_size, bool), _Look(seed)
    dtype, waiting, begin = np.dtype('<u2' if tokenizer.vocab_size <= 2**16 else '<u4'), deque(), time.perf_counter()
    pieces = _first(clean(pieces, report), limit)
    pieces = look(near_duplicates(pieces, report) if near else pieces)
    if not dry_run:
        os.makedirs(folder, exist_ok=True)
    with _one_line_interrupt(), ExitStack() as stack:
        stack.callback(lambda: dry_run or os.listdir(folder) or os.rmdir(folder))   # if nothing came of it
        bar = stack.enter_context(tqdm(total=total or None, unit='B', unit_scale=True, disable=None))
        own = local()   # to each thread
        pool = stack.enter_context(ThreadPoolExecutor(
            threads, initializer=lambda: setattr(own, 'tokenizer', _twin(tokenizer))))
        outputs = {split: _Output(stack, os.path.join(folder, split), dtype, dry_run) for split in ('train', 'val')}

        def write_next():
            for split, (ids, learn) in waiting.popleft().result().items():
                outputs[split].add(ids, learn)
                used[ids] = True
            tokens = sum(output.tokens for output in outputs.values())
            bar.set_postfix_str(f'{tokens / (time.perf_counter() - begin):,.0f} tok/s', refresh=False)
        for batch in _batches(pieces, _lottery(val_fraction, seed), bar):
            waiting.append(pool.submit(lambda batch: _encode(own.tokenizer, batch, eot), batch))
            if len(waiting) > 2 * threads:
                write_next()
        while waiting:
            write_next()
        for split, output in outputs.items():
            if not output.tokens:
                found = ''.join(f', {number:,} {what}' for what, number in report.items() if number)
                fail(f"no document is left for {split} of {look.documents:,}, --val_fraction={val_fraction}{found}")
            if not output.learned:
                fail(f"no token of {split} is to be learned: a completion, or what the role 'assistant' says, is")
        if not dry_run:
            for output in outputs.values():
                output.sync()   # before the first of the files gets its name
            files = {split: (output.tokens, output.sha256) for split, output in outputs.items()}
            files |= {f'{split}.mask': (output.tokens, output.mask_sha256)
                      for split, output in outputs.items() if output.mask}
            write_meta(folder, tokenizer, {name: tokens for name, (tokens, _) in files.items()},
                       {name: sha256.hexdigest() for name, (_, sha256) in files.items()})
            old = {'train.mask', 'val.mask'} - {*files}   # of a dataset that was here before
            for name in [f'{name}.bin' for name in old] + ['meta.pkl'] * (tokenizer.name != 'char'):
                Path(folder, name).unlink(missing_ok=True)
    _print_report(report, look, outputs, used)


def _first(pieces: Iterable[Piece], limit: int) -> Iterator[Piece]:
    """ those of the first limit documents, all if it is 0 """
    number = 0
    for piece in pieces:
        number += piece.first
        if limit and number > limit:
            return
        yield piece
        if number == limit and piece.last and not piece.split:
            return


def _print_report(report: Report, look: _Look, outputs: dict[str, _Output], used: np.ndarray) -> None:
    tokens = sum(output.tokens for output in outputs.values())
    rows = [(what, f'{number:,}') for what, number in report.items() if number]
    rows += [('documents that stay', f'{look.documents:,}'), ('characters', f'{look.characters:,}'),
             ('longest document, characters', f'{look.longest:,}'), ('tokens', f'{tokens:,}'),
             *((f'tokens in {split}', f'{output.tokens:,}') for split, output in outputs.items()),
             *((f'tokens to be learned in {split}', f'{output.learned:,}') for split, output in outputs.items()
               if output.learned < output.tokens),
             ('characters per token', f'{look.characters / tokens:.2f}'),
             ('vocabulary used', f'{used.sum():,} of {len(used):,} ids ({used.mean():.1%})')]
    width = max(len(what) for what, _ in rows)
    for what, number in rows:
        print0(f'{what:{width}}  {number}')
    print0("five of them:")
    for text in look.sample:
        print0('  ' + repr(text))


# ---- comparison of tokenizers

def compare(arguments: list[str], names: Iterable[str]) -> None:
    """ python dataset.py compare FILE: a table of what each tokenizer makes of a text, and how fast """
    if len(arguments) != 2 or arguments[0] != 'compare' or not os.path.isfile(path := arguments[1]):
        fail("write: python dataset.py compare FILE, with a text file that exists")
    text = ''.join(piece.text for piece in read_text(path, Report()))
    if not text:
        fail(f"{path} is empty or no text")
    print0(f"{path}: {len(text):,} characters, {len(text.encode()):,} bytes of UTF-8")
    print0(f"{'tokenizer':12} {'ids':>8} {'tokens':>12} {'chars/token':>12} {'ms/MB':>7}  first tokens")
    for name in names:
        tokenizer = CharTokenizer(sorted(set(text))) if name == 'char' else BPETokenizer(name)
        tokenizer.encode(text[:1000])
        begin = time.perf_counter()
        ids = _ids(tokenizer, text)
        speed = (time.perf_counter() - begin) * 1e3 / (len(text.encode()) / 1e6)
        first = ' '.join(repr(tokenizer.decode([i])) for i in ids[:8].tolist())
        print0(f'{name:12} {tokenizer.vocab_size:8,} {len(ids):12,} {len(text) / len(ids):12.2f} {speed:7.0f}  {first}')
