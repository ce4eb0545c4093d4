# For a CPU: docker build -t fixmatch . && docker run fixmatch
# For a GPU: docker build -t fixmatch --build-arg PADDLE=gpu --build-arg CUDA=126 . && docker run --gpus all fixmatch
# Never built where it was written, which has no Docker; tests/test_install.py holds its steps to the Makefile's.
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends git libgomp1 make && rm -r /var/lib/apt/lists/*
WORKDIR /fixmatch
COPY . .
ARG PADDLE=cpu
ARG CUDA=126
RUN make install PADDLE="$PADDLE" CUDA="$CUDA"
ENTRYPOINT [".venv/bin/fixmatch"]
CMD ["train", "-c", "digits"]
