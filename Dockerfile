# s2d3d in a container. Build it in the root of the repository:
#     docker build --tag s2d3d .
#     docker build --tag s2d3d:cuda --build-arg BASE=nvidia/cuda:TAG .    # a TAG that ends in runtime-ubuntu24.04
# Then use it like the command, with the current folder as working directory (with a GPU: also --gpus all):
#     docker run --rm --volume "$PWD:/data" --user "$(id -u):$(id -g)" s2d3d train configs/files.yaml data.root=scans
#
# BASE: a Debian or Ubuntu image, with Python 3.11 to 3.13 or with a Python of these versions in its packages.
# TORCH_INDEX: address of an index with CPU-only wheels of torch, which save 4 GB; default: the ordinary index, whose
#     wheels bring their CUDA libraries along and use a GPU of the host with any base.
# EXTRAS: which optional packages are installed, see setup.py.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG TORCH_INDEX=""
ARG EXTRAS="plots,html,mesh,export,hub"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential \
    && { command -v python3 || apt-get install --yes --no-install-recommends python3 python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/s2d3d
ENV PATH=/opt/s2d3d/bin:$PATH
WORKDIR /source
COPY constraints.txt ./
# torch first: torch-scatter compiles against it, which takes minutes and is kept as a layer of its own.
RUN pip install --constraint constraints.txt setuptools wheel ninja \
    && pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
RUN pip install --constraint constraints.txt --no-build-isolation torch-scatter
COPY setup.py pyproject.toml README.md ./
COPY s2d3d s2d3d
COPY tools tools
COPY configs configs
RUN pip install --constraint constraints.txt --no-build-isolation ".[${EXTRAS}]"

FROM ${BASE}
# System libraries of Open3D, and the Python of the other stage.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libusb-1.0-0 libegl1 libgl1 libgl1-mesa-dri libgomp1 \
    && { command -v python3 || apt-get install --yes --no-install-recommends python3; } \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home s2d3d \
    && mkdir /data && chown s2d3d /data
COPY --from=build /opt/s2d3d /opt/s2d3d
# Caches have a place for any user that `docker run --user` names.
ENV PATH=/opt/s2d3d/bin:$PATH XDG_CACHE_HOME=/var/tmp/cache MPLCONFIGDIR=/var/tmp/cache/matplotlib
USER 10001
WORKDIR /data
ENTRYPOINT ["s2d3d"]
CMD ["--help"]
