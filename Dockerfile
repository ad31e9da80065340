# docker build --target cpu -t loraplex:cpu .
# docker build --target cuda -t loraplex:cuda .
# docker run -p 8080:80 -v loraplex:/data loraplex:cpu --model-id org/model --lora-adapters=org/a,org/b

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS runtime
# A user of any other number is as good: without a name it has group 0, as Docker and OpenShift give it.
RUN useradd --no-create-home --home-dir /data --uid 1000 loraplex \
    && install --directory --owner loraplex --group root --mode 0775 /data
ENV PATH=/opt/loraplex/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/data \
    HF_HOME=/data \
    XDG_CACHE_HOME=/data/cache \
    PORT=80
# A user who is not root may listen on 80: Docker (since 20.10) and containerd 2 set net.ipv4.ip_unprivileged_port_start
# to 0 inside the container. Where that is not so, the start says that the port is not permitted: choose PORT=8080.
WORKDIR /data
VOLUME /data
EXPOSE 80
# Loading may take long: it counts as starting, not as unhealthy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health', timeout=4)"]
ENTRYPOINT ["loraplex"]
RUN python -m venv /opt/loraplex && /opt/loraplex/bin/python -m pip install --quiet pip==26.3
COPY constraints.txt /src/

# Our own code as it lies in the environment, and the names of what it needs.
FROM runtime AS code
COPY . /src
RUN python -m pip install --no-deps --prefix /code /src \
    && python -c "import tomllib; print(*tomllib.load(open('/src/pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > /src/requirements.txt

# Both images: torch, then the other packages, then our code, so that a change of it renews one small layer.
FROM runtime AS cuda
# Triton loads each kernel through a small library that it compiles on the kernel's first use.
RUN apt-get update && apt-get install --no-install-recommends --yes gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# For the NVIDIA container runtime: which of the driver's parts to bring in.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN python -m pip install --constraint /src/constraints.txt torch==2.13.0
COPY --from=code /src/requirements.txt /src/
# Packages for what the image leaves out, by name: transformers for --modeling transformers.
ARG EXTRA_PACKAGES=
RUN python -m pip install --constraint /src/constraints.txt --requirement /src/requirements.txt ${EXTRA_PACKAGES}
COPY --from=code /code /opt/loraplex
USER 1000

FROM runtime AS cpu
# The Python package index has torch for CUDA alone; this one has the build for the CPU.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m pip install --constraint /src/constraints.txt --extra-index-url ${TORCH_INDEX} torch==2.13.0
COPY --from=code /src/requirements.txt /src/
ARG EXTRA_PACKAGES=
RUN python -m pip install --constraint /src/constraints.txt --requirement /src/requirements.txt ${EXTRA_PACKAGES}
COPY --from=code /code /opt/loraplex
USER 1000
