# Builds an image that serves BERT models.
#   CPU:   docker build -t bert-jax . && docker run -p 8000:8000 -v bert-jax:/cache bert-jax
#   CUDA:  docker build --target cuda -t bert-jax:cuda . && docker run --gpus all -p 8000:8000 -v bert-jax:/cache bert-jax:cuda
#   A model of your own, and a key:
#          docker run -p 8000:8000 -v bert-jax:/cache -v "$PWD/my-model:/model:ro" -e BERT_JAX_API_KEY=… bert-jax /model
# The volume keeps models from the Hub, and compiled programs, so that the next start is fast.
# The Debian packages are not pinned, so each uncached build installs the current security updates.
FROM debian:trixie-slim AS base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/bert-jax \
    && useradd --uid 10001 --create-home server \
    && mkdir /cache \
    && chown server /cache
ENV PATH=/opt/bert-jax/bin:$PATH HF_HOME=/cache/hub BERT_JAX_COMPILATION_CACHE=/cache/programs
COPY . /source
EXPOSE 8000
VOLUME /cache
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["bert-jax", "serve", "--host", "0.0.0.0"]
CMD ["bert-mini-cased"]

FROM base AS cuda
RUN pip install --no-cache-dir "/source[serve,cuda]" && rm -rf /source
USER 10001

FROM base AS cpu
RUN pip install --no-cache-dir "/source[serve]" && rm -rf /source
USER 10001
