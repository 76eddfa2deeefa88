"""The CUDA kernels beside their peers, on one GPU that has torch, triton and nothing else (`make bench-cuda`).

python -m benchmarks.cuda.model      what to expect; needs no GPU
python -m benchmarks.cuda.tune       the best tile of each product; `--write` puts them into tiles.json
python -m benchmarks.cuda            every case beside its peers; table, JSON, picture in benchmarks/results
"""
