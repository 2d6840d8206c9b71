# The project with its environment.
#   docker build -t olmo-sft .                             # CPU
#   docker build -t olmo-sft --build-arg TORCH=2.13.0 .    # CUDA: PyPI's build, which brings its libraries; the host has the driver
#   docker run --rm -v "$PWD/runs:/olmo-sft/runs" -v "$PWD/data:/data:ro" olmo-sft all RECIPE=smoke
#   docker run --rm --gpus all --ipc=host …                # with GPUs
FROM python:3.11-slim-bookworm

# Make and git run the stages and name the commit; gcc compiles the kernels of torch.compile.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git libc6-dev make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /olmo-sft
ARG TORCH=2.13.0+cpu

# The environment alone first: an edit of the code does not install it again. `make jobs` lists nothing here and needs only what runs need;
# `make setup` would add the tools of the tests.
COPY pyproject.toml setup.py README.md Makefile ./
COPY env env
COPY lib lib
COPY stages stages
COPY recipes recipes
# Set-up leaves bytecode to the first import, which would be made again in every container. This variable makes set-up compile all modules.
RUN TORCH="$TORCH" PYTHONDONTWRITEBYTECODE=1 make jobs PYTHON=python3 && rm -rf /root/.cache

COPY . .
ENV TORCH=$TORCH
ENTRYPOINT ["make"]
CMD ["help"]
