""" Your own texts: any .txt, .md, .jsonl or .parquet files, into data/<name>/.

$ python data/text/prepare.py --source=books/ --name=mybook
$ python data/text/prepare.py --source=chats.jsonl --name=chats --tokenizer=gpt2 --dry_run=True
$ python train.py config/train_shakespeare_char.py --dataset=mybook
"""
import os
import sys
from itertools import chain

folder = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(folder, '..', '..'), os.path.join(folder, '..')]
from configurator import configure

# ---- configuration
source = ''                     # a file, or a folder with files
name = ''                       # of the dataset, the folder data/<name>
extensions = '.txt,.md,.jsonl,.parquet'
tokenizer = 'gpt2'              # gpt2, cl100k_base, o200k_base, or char: one token for each character
field = 'text'                  # of a .jsonl, where prompt and completion or messages work too, or .parquet file
val_fraction = 0.1              # of the documents, or of the end of each where there are few
on_bad = 'stop'                 # at a line of .jsonl that cannot be used, or 'skip' it
near_duplicates = False         # count documents that are nearly the same, by datasketch; slow
num_proc = 0                    # threads, 0: one for each processor
limit = 0                       # documents, 0: all
dry_run = False                 # look at the documents and write nothing
config = configure(globals())

import corpus
from common import fail, one_line_errors
from dataset import CharTokenizer, make_tokenizer

if not source or not name:
    fail("say what and where to: --source=FILE_OR_FOLDER --name=NAME")
if os.path.basename(name) != name or name.startswith('.'):
    fail(f"--name={name} is no name of a folder")
if os.path.exists(os.path.join(folder, '..', name, 'prepare.py')):
    fail(f"--name={name} is a dataset of its own; choose another name")
if not 0 < val_fraction <= 0.5:
    fail(f"--val_fraction={val_fraction} must be above 0 and at most 0.5")


def documents(report):
    if few:
        return chain.from_iterable(corpus.read_text_with_val(path, report, val_fraction) for path in paths)
    return corpus.read_documents(paths, report, field, on_bad)


with one_line_errors():
    paths = corpus.find_files(source, extensions)
    few = len(paths) < 1 / val_fraction and not any(path.endswith(('.jsonl', '.parquet')) for path in paths)
    if tokenizer == 'char':
        chars = set()
        for piece in corpus.clean(documents(corpus.Report()), corpus.Report()):
            chars.update(piece.text)
        encoder = CharTokenizer(sorted(chars))
    else:
        encoder = make_tokenizer({'name': tokenizer})
    pieces = documents(report := corpus.Report())
    corpus.write_corpus(os.path.join(folder, '..', name), encoder, pieces, report, val_fraction=val_fraction,
                        num_proc=num_proc, total=corpus.size_of(paths), limit=limit, near=near_duplicates,
                        dry_run=dry_run)
