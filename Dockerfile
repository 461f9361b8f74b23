# The command line on CPU (the default) or an NVIDIA GPU:
#   docker build -t maskclip .                             docker run --rm -v "$PWD:/work" maskclip segment photo.jpg …
#   docker build -t maskclip --build-arg EXTRA=web,cuda12 . docker run --rm --gpus all -v "$PWD:/work" maskclip …
# jax[cuda12] brings CUDA's libraries; the host needs the driver and nvidia-container-toolkit.
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY maskclip_jax ./maskclip_jax
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /dist

FROM python:3.12-slim
ARG EXTRA=web
COPY --from=build /dist /dist
RUN pip install --no-cache-dir "$(ls /dist/*.whl)[$EXTRA]" && rm -r /dist \
  && useradd --create-home maskclip && install --directory --owner maskclip /work
USER maskclip
WORKDIR /work
EXPOSE 7860
ENTRYPOINT ["maskclip"]
CMD ["--help"]
