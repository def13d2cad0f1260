""" OpenWebText in GPT-2's tokens: 8 million documents, 9 billion tokens, 17 GB; or any other corpus.

$ python data/openwebtext/prepare.py
$ python data/openwebtext/prepare.py --source=HuggingFaceFW/fineweb --subset=sample-10BT --limit=100000
$ python data/openwebtext/prepare.py --source=my_parquet_files/
"""
import os
import sys

folder = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(folder, '..', '..'), os.path.join(folder, '..')]
from configurator import configure

# ---- configuration
source = 'Skylion007/openwebtext'        # a name on the Hugging Face Hub, or local files: .txt, .md, .jsonl, .parquet
subset = ''                              # of a dataset on the Hub
revision = ''                            # of a dataset on the Hub: a branch, a tag or a commit; '': see below
field = 'text'                           # the column with the text
val_fraction = 0.0005                    # of the documents
seed = 2357                              # which ones
tokenizer = 'gpt2'                       # or cl100k_base, o200k_base
on_bad = 'stop'                          # at a line of .jsonl that cannot be used, or 'skip' it
near_duplicates = False                  # count those that are nearly the same, by datasketch; slow
num_proc = 0                             # threads, 0: one for each processor
limit = 0                                # documents, 0: all
dry_run = False                          # look at the documents and write nothing
config = configure(globals())

import corpus
from common import one_line_errors
from dataset import make_tokenizer

with one_line_errors():
    report, total = corpus.Report(), 0
    extensions = '.txt,.md,.jsonl,.parquet'
    if os.path.exists(source) or source.startswith(('.', '/', '~')) or source.endswith(('/', *extensions.split(','))):
        paths = corpus.find_files(os.path.expanduser(source), extensions)
        pieces, total = corpus.read_documents(paths, report, field, on_bad), corpus.size_of(paths)
    else:
        # the commit of OpenWebText with 8,013,769 documents in 80 Parquet files
        pinned = {'Skylion007/openwebtext': '79d93d786212f7344586290adb811d4ae6a1762c'}
        table = corpus.load_table(field, source, *([subset] if subset else []),
                                  revision=revision or pinned.get(source, 'main'))
        pieces = corpus.read_table(table, report, field)
    corpus.write_corpus(folder, make_tokenizer({'name': tokenizer}), pieces, report, val_fraction=val_fraction,
                        seed=seed, num_proc=num_proc, total=total, limit=limit, near=near_duplicates,
                        dry_run=dry_run)
