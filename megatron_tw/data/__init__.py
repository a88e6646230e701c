"""Documents to token rows, and token rows to batches.

The way of the data, one module a step:

    documents.py   input files -> documents: text, or ready token ids
    opening.py     those files opened: decompressed, and Hugging Face datasets on disk
    tokenizer.py   text -> token ids; the fingerprint of what decides them
    prepare.py     documents -> rows of BOS + N-1 tokens, in several processes
    rows_writer.py the folder of prepared rows, written once (what is in it: rows_format.py)
    rows.py        the folder of prepared rows, opened: TokenRows
    blend.py       several such folders as one, each with its share of the samples
    loader.py      rows -> the micro-batches of a data-parallel rank, resumed by one number

Nothing is imported here: preparing with several processes starts Python once a process, which must not wait for torch.
"""
