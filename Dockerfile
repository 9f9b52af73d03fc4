# resnet-jax on NVIDIA GPUs. The wheels of JAX bring CUDA; the host needs its driver and the NVIDIA Container Toolkit.
#   docker build -t residual-jax .
#   docker run --gpus all -v "$PWD/runs:/work/runs" residual-jax train --workdir runs/a
FROM python:3.13-slim-trixie

ARG EXTRAS=cuda13,train,hub,export,fast
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1

COPY . /tmp/source
RUN pip install --no-cache-dir "/tmp/source[${EXTRAS}]" && rm -rf /tmp/source \
    && useradd --create-home --uid 1000 user && install -d -o user /work /work/runs

USER 1000
WORKDIR /work
ENTRYPOINT ["resnet-jax"]
CMD ["--help"]
