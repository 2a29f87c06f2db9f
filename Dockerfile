# The OpenAI-compatible server, on the CPU.
#
#     docker build --build-arg TORCH_INDEX=... -t infllm-agent .
#     docker run -p 8000:8000 -v sessions:/data -e INFLLM_API_KEYS=ops=KEY --stop-timeout 60 infllm-agent
#
# Without keys it does not start: inside a container it has to listen on all interfaces. More options: docs/server.md.
FROM python:3.11-slim AS build

WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY infllm_agent infllm_agent
COPY kernels kernels
COPY integrations integrations
# The index of CPU builds that PyTorch's installation page names: of the version in constraints.txt pip prefers the one
# marked +cpu. Without it, gigabytes of CUDA are installed.
ARG TORCH_INDEX=
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[server,metrics]"

FROM python:3.11-slim

COPY --from=build /opt/venv /opt/venv
RUN useradd --create-home --uid 1000 infllm && install -d -m 700 -o infllm -g infllm /data
USER infllm
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    INFLLM_CACHE=/data/models \
    HF_HOME=/data/models/hub
VOLUME /data
EXPOSE 8000
HEALTHCHECK --start-period=5m --interval=30s --timeout=5s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["infllm-agent"]
CMD ["serve", "--host", "0.0.0.0", "--root", "/data/sessions", "--model", "smollm2"]
