# docker build --target cpu -t loraplex:cpu .
# docker build --target cuda -t loraplex:cuda .
# docker run -p 8080:80 -v "$PWD/data:/data" loraplex:cpu --model-id org/model --lora-adapters=org/a,org/b

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# The same pip lines as in the Makefile, without the tools of development.
FROM ${PYTHON_IMAGE} AS set-up
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/loraplex && /opt/loraplex/bin/python -m pip install --quiet pip==26.3
ENV PATH=/opt/loraplex/bin:$PATH
COPY constraints.txt /src/

FROM set-up AS set-up-cpu
# The Python package index has torch for CUDA alone; this one has the build for the CPU.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m pip install --constraint /src/constraints.txt --extra-index-url ${TORCH_INDEX} torch==2.13.0
COPY . /src
RUN python -m pip install --constraint /src/constraints.txt /src

FROM set-up AS set-up-cuda
RUN python -m pip install --constraint /src/constraints.txt torch==2.13.0
COPY . /src
RUN python -m pip install --constraint /src/constraints.txt /src

FROM ${PYTHON_IMAGE} AS runtime
RUN useradd --create-home --uid 1000 loraplex && install --directory --owner loraplex /data
ENV PATH=/opt/loraplex/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data \
    XDG_CACHE_HOME=/data/cache \
    PORT=80
# A user who is not root may listen on 80: Docker (since 20.10) and containerd 2 set net.ipv4.ip_unprivileged_port_start
# to 0 inside the container. Where that is not so, the start says that the port is not permitted: choose PORT=8080.
USER 1000
WORKDIR /home/loraplex
VOLUME /data
EXPOSE 80
# Loading may take long: it counts as starting, not as unhealthy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health', timeout=4)"]
ENTRYPOINT ["loraplex"]

FROM runtime AS cuda
# Triton loads each kernel through a small library that it compiles on the kernel's first use.
USER root
RUN apt-get update && apt-get install --no-install-recommends --yes gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 1000
# For the NVIDIA container runtime: which of the driver's parts to bring in.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=set-up-cuda /opt/loraplex /opt/loraplex

FROM runtime AS cpu
COPY --from=set-up-cpu /opt/loraplex /opt/loraplex
