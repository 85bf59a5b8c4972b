# syntax=docker/dockerfile:1
# Three images of the same code:
#   light  producers, status, results, Flower, migrations; no torch.   docker build --target light -t readroom:light .
#   gpu    workers, with PyPI's CUDA build of torch.                   docker build --target gpu -t readroom:gpu .
#   cpu    workers without a GPU, with torch's CPU build.              docker build --target cpu -t readroom:cpu .
# No secret is ever an argument, a layer or a default: passwords arrive at run time, from the environment or from files.

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/venv/bin:$PATH READROOM_HOME=/var/lib/readroom
# A fixed id, so that the owner of a mounted folder can be told: chown -R 10001:10001 /srv/readroom
RUN groupadd --gid 10001 readroom \
    && useradd --uid 10001 --gid readroom --home-dir /var/lib/readroom --create-home readroom \
    && chmod 700 /var/lib/readroom
WORKDIR /opt/readroom

# Packages first: this layer changes only with pyproject.toml and constraints.txt. The packages named in pyproject.toml
# must exist for an editable install, so empty folders stand in for them until the source is copied.
FROM base AS build
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p readroom producer worker models training db/migrations/versions \
    && python -m venv /opt/venv

FROM build AS build-light
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt setuptools \
    && pip install --constraint constraints.txt --no-build-isolation --editable ".[postgres,flower,parquet]"

FROM build AS build-gpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt setuptools \
    && pip install --constraint constraints.txt --no-build-isolation --editable ".[models,decoders,regions,postgres]"

FROM build AS build-cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt setuptools \
    && pip install --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu \
        --no-build-isolation --editable ".[models,decoders,regions,postgres]"

FROM base AS source
COPY . .

FROM base AS light
COPY --from=build-light /opt/venv /opt/venv
COPY --from=source /opt/readroom /opt/readroom
USER readroom
VOLUME /var/lib/readroom
CMD ["readroom", "--help"]

# A worker is healthy while its process lives: it ends by itself when its device breaks, a forward pass hangs, or work
# waits and none arrives. So the restart policy is its health check, and none is declared here.
FROM base AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
COPY --from=source /opt/readroom /opt/readroom
# Weights come from a mounted folder. Nothing asks a hub at run time.
ENV HF_HUB_OFFLINE=1 READROOM_DEVICE=cpu
USER readroom
VOLUME /var/lib/readroom
STOPSIGNAL SIGTERM
CMD ["readroom", "worker", "--queue", "caption"]

FROM base AS gpu
COPY --from=build-gpu /opt/venv /opt/venv
COPY --from=source /opt/readroom /opt/readroom
ENV HF_HUB_OFFLINE=1 READROOM_DEVICE=cuda NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER readroom
VOLUME /var/lib/readroom
STOPSIGNAL SIGTERM
CMD ["readroom", "worker", "--queue", "caption"]
