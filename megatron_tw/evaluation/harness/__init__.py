"""lm-evaluation-harness (`lm_eval`) on models of this project.

    sequences.py   log-likelihoods of many sequences by forward passes under any layout
    adapter.py     an lm_eval model over a parallel model: log-likelihood requests
    generation.py  lm_eval's own Hugging Face model, which generates, and goes on where it stopped
    datasets.py    data sets from folders on disk, as they lie on the Hugging Face hub
    suites.py      MMLU, BBH, LongBench, LongBench v2

lm_eval is imported inside functions: it is optional.
"""
