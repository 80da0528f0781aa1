# syntax=docker/dockerfile:1
# The command mosaic as an image, for CPUs or for NVIDIA's GPUs:
#   docker build --target cpu -t mosaic:cpu .
#   docker build --target cuda -t mosaic:cuda .
#   docker run --rm --shm-size=2g -v "$PWD/results:/work" mosaic:cpu run
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir -c constraints.txt build hatchling
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt
COPY README.md LICENSE ./
COPY mosaic_ray mosaic_ray
COPY tune_spaces tune_spaces
RUN /opt/build/bin/python -m build --wheel --no-isolation

# What the package needs, without the package: a change of its code leaves these layers as they are.
FROM python:${PYTHON}-slim AS packages
WORKDIR /src
COPY constraints.txt ./
COPY --from=wheel /src/requirements.txt ./
RUN python -m venv /opt/venv

FROM packages AS packages-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/pip install -c constraints.txt --extra-index-url "$TORCH_INDEX" -r requirements.txt

FROM packages AS packages-cuda
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/pip install -c constraints.txt -r requirements.txt

FROM python:${PYTHON}-slim AS runtime
RUN useradd --create-home --uid 1000 mosaic && install -d -o mosaic -g mosaic /work
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["mosaic"]
CMD ["--help"]

FROM runtime AS cpu
COPY --from=packages-cpu /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/src/dist,target=/dist pip install --no-cache-dir --no-deps /dist/*.whl
USER mosaic

# PyTorch's own wheels bring CUDA; the host needs NVIDIA's driver and container toolkit: docker run --gpus all ...
FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-cuda /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/src/dist,target=/dist pip install --no-cache-dir --no-deps /dist/*.whl
USER mosaic
