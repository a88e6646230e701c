# On NVIDIA's PyTorch image, whose own builds of torch, Transformer Engine and Apex stay. Megatron-Core 0.16 takes
# Transformer Engine 2.9 to 2.11, so mind that when changing the release.
#
#   docker build -t megatron-tw .
#   docker run --rm megatron-tw                                   # shows the options of tools/train.py
#   docker run --rm --gpus all --ipc host --network host -v /data:/data megatron-tw \
#       bash examples/extend_llama3_32k.sh --load-hf /data/model --data-path /data/rows --save /data/run
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}

WORKDIR /opt/megatron_tw
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY megatron_tw megatron_tw
COPY tools tools
COPY examples examples
COPY tests tests

# What the image has keeps its version: its list comes first, and of constraints.txt only the other packages remain.
# (`pip list`, not `pip freeze`: the latter names the image's own wheels by a path that is gone. The image's
# PIP_CONSTRAINT says the same for its packages; it is switched off so that one list is in force.)
RUN pip list --format=freeze | tr 'A-Z_' 'a-z-' | sort > /tmp/image.txt \
 && cut -d= -f1 /tmp/image.txt > /tmp/names.txt \
 && sed 's/#.*//' constraints.txt | tr 'A-Z_' 'a-z-' \
    | awk -F== 'NR == FNR { have[$1]; next } NF && !($1 in have)' /tmp/names.txt - >> /tmp/image.txt \
 && PIP_CONSTRAINT= pip install --no-cache-dir -c /tmp/image.txt -e '.[dev]'

CMD ["python", "tools/train.py", "--help"]
