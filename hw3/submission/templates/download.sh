#!/bin/bash
# Puts the adapter into adapter_checkpoint/ and checks it. Nothing is fetched where it is already there and whole.
set -euo pipefail
cd "$(dirname "$0")"

# The address of a folder that holds the two files, for instance https://huggingface.co/NAME/REPOSITORY/resolve/main
URL=''
SHA256_CONFIG=''
SHA256_WEIGHTS=''

whole() {
    sha256sum --check --status - <<SUMS
$SHA256_CONFIG  $1/adapter_config.json
$SHA256_WEIGHTS  $1/adapter_model.safetensors
SUMS
}

if whole adapter_checkpoint 2>/dev/null; then
    echo "adapter_checkpoint: there, and whole"
    exit 0
fi
if [ -z "$URL" ]; then
    echo "adapter_checkpoint: not there, or not whole, and download.sh has no address to fetch it from:" >&2
    echo "upload the two files of adapter_checkpoint/ somewhere and write the folder's address into URL='' above" >&2
    exit 1
fi
partial=adapter_checkpoint.part
mkdir -p "$partial"
for file in adapter_config.json adapter_model.safetensors; do
    if command -v curl >/dev/null; then
        curl --fail --location --retry 3 --output "$partial/$file" "$URL/$file"
    else
        wget --tries=3 --output-document="$partial/$file" "$URL/$file"
    fi
done
if ! whole "$partial"; then
    echo "$URL: what came is not the adapter that was packed (its SHA-256 differs)" >&2
    exit 1
fi
rm -rf adapter_checkpoint
mv "$partial" adapter_checkpoint
echo "adapter_checkpoint: fetched, and whole"
