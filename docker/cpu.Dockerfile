# epbackend on CPUs, set up by the README's own command. From the project's folder:
#
#   docker build --file docker/cpu.Dockerfile --tag epbackend .
#   docker run --read-only --tmpfs /tmp --shm-size 1g --publish 23333:23333 epbackend \
#     serve tiny-qwen3-moe --device cpu --ep-size 2 --host 0.0.0.0
FROM python:3.11-slim

RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/epbackend
COPY . .
# The default index brings torch's CUDA build, several gigabytes of it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN make setup TORCH_INDEX=$TORCH_INDEX

USER 65534
# What is compiled and measured is kept where this user can write, for all processes of a container.
ENV NUMBA_CACHE_DIR=/tmp/numba XDG_CACHE_HOME=/tmp/cache
EXPOSE 23333
ENTRYPOINT ["/opt/epbackend/.venv/bin/epbackend"]
