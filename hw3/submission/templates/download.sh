#!/bin/bash
# Downloads the adapter to adapter_checkpoint/ and verifies its checksums. An adapter that is complete is not downloaded.
set -euo pipefail
cd "$(dirname "$0")"

# URL of a folder with the two files, for example https://huggingface.co/NAME/REPOSITORY/resolve/main
URL=''
SHA256_CONFIG=''
SHA256_WEIGHTS=''

is_complete() {
    sha256sum --check --status - <<SUMS
$SHA256_CONFIG  $1/adapter_config.json
$SHA256_WEIGHTS  $1/adapter_model.safetensors
SUMS
}

if is_complete adapter_checkpoint 2>/dev/null; then
    echo "adapter_checkpoint: complete"
    exit 0
fi
if [ -z "$URL" ]; then
    echo "adapter_checkpoint: missing or incomplete, and download.sh has no URL to download it from;" >&2
    echo "upload the two files of adapter_checkpoint/ and set URL='' in this script to the URL of their folder" >&2
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
if ! is_complete "$partial"; then
    echo "$URL: the downloaded files are not the packed adapter (SHA-256 differs)" >&2
    exit 1
fi
rm -rf adapter_checkpoint
mv "$partial" adapter_checkpoint
echo "adapter_checkpoint: downloaded, complete"
