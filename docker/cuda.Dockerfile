# epbackend on GPUs, beside the LMDeploy 0.18.0 of an image that serves your models already. From the project's folder:
#
#   docker build --file docker/cuda.Dockerfile --build-arg LMDEPLOY_IMAGE=... --tag epbackend:cuda .
#   docker run --gpus all --shm-size 8g --read-only --tmpfs /tmp:exec --publish 23333:23333 --volume /models:/models:ro \
#     epbackend:cuda serve /models/deepseek --device cuda --ep-size 8 --host 0.0.0.0
ARG LMDEPLOY_IMAGE
FROM ${LMDEPLOY_IMAGE}

WORKDIR /opt/epbackend
COPY . .
RUN python3 -m pip install ".[cuda,serve]"

USER 65534
# Triton compiles each kernel at its first launch, numba the planner's functions: kept where this user can write.
ENV TRITON_CACHE_DIR=/tmp/triton NUMBA_CACHE_DIR=/tmp/numba
EXPOSE 23333
ENTRYPOINT ["epbackend"]
