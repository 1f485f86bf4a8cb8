# Training, search and export in a container: on a CPU, or with TORCH=cu130 on a GPU.
#
#   docker build -t vae-hyperband .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" vae-hyperband train --run first
#
# A search needs shared memory: docker run --shm-size 2g ... search. On a cluster: apptainer.def.
FROM debian:trixie-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates make python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/vae-hyperband
COPY Makefile pyproject.toml constraints.txt README.md LICENSE ./
COPY vae_hyperband vae_hyperband

ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1
RUN make setup VENV=/opt/venv EXTRAS=search,export TORCH=$TORCH

# anyone may run it: caches and runs go below /work, which is the caller's
ENV PATH=/opt/venv/bin:$PATH HOME=/work MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /work
ENTRYPOINT ["vae-hyperband"]
CMD ["--help"]
