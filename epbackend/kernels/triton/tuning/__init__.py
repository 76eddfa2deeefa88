"""Find the best tile of each product on the GPU at hand: `epbackend tune`.

`candidates.py` says which tiles are worth a try, `job.py` what is run with them, `search.py` tries them all.
"""
