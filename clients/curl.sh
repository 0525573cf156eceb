#!/usr/bin/env bash
# Calls /classify, /energy and /generate with curl: clients/curl.sh cat.png [http://localhost:8000]
# Writes generated.png and generated-grid.png into the current folder.
# Stops at the first unexpected response, which is reported in one line with its status and not saved.
set -euo pipefail
image=${1:?usage: clients/curl.sh IMAGE [URL]}
url=${2:-http://localhost:8000}
url=${url%/}
aside=$(mktemp -d)
trap 'rm -rf "$aside"' EXIT
# retries a busy server and a dropped connection; reads images from standard input, so that their names may hold any character
curl=(curl -sS --retry 2 --retry-all-errors --retry-max-time 60 --max-time 180 -D "$aside/head")
key=$(printf %s "${LIT_SERVER_API_KEY:-}" | LC_ALL=C tr -d '\r')  # without the line end of a key file
if [ "$(printf %s "$key" | LC_ALL=C tr -d ' -~' | wc -c)" -ne 0 ]; then
    echo "LIT_SERVER_API_KEY has characters that are not printable ASCII: set it to the server's key" >&2
    exit 2
fi
if [ -n "$key" ]; then curl+=(-H "X-API-Key: $key"); fi

# check KIND: fail unless the last response has status 200 and content type KIND
check() {
    local status kind
    status=$(awk '/^HTTP\//{status=$2} END{print status}' "$aside/head")
    kind=$(tr -d '\r' < "$aside/head" | awk 'tolower($1)=="content-type:"{kind=$2} END{print kind}')
    case "$status ${kind%%;*}" in "200 $1") return ;; esac
    echo "HTTP ${status:-nothing} (${kind:-no content type}) instead of $1: $(tr -cd '[:print:]' < "$aside/body" | cut -c1-200)" >&2
    exit 1
}
# ask KIND PATH [OPTION...]: store the response in $aside/body and check it
ask() {
    local kind=$1 path=$2
    shift 2
    : > "$aside/body"
    "${curl[@]}" -o "$aside/body" "$@" "$url$path"
    check "$kind"
}
json=application/json

echo "# the image as the body"
ask $json /classify --data-binary @- < "$image"; cat "$aside/body"; echo
echo "# as a form field"
ask $json /classify -F 'image=@-;filename=image' < "$image"; cat "$aside/body"; echo
echo "# as base64 in JSON, one or several"
base64 < "$image" | tr -d '\n' | sed 's/.*/{"image": "&"}/' > "$aside/one"
ask $json /energy -H 'Content-Type: application/json' --data-binary @- < "$aside/one"; cat "$aside/body"; echo
base64 < "$image" | tr -d '\n' | sed 's/.*/{"images": ["&", "&"]}/' > "$aside/two"
ask $json /classify -H 'Content-Type: application/json' --data-binary @- < "$aside/two"; cat "$aside/body"; echo
echo "# one image of class 3, and an enlarged grid of sixteen"
ask image/png "/generate?class=3"; cp "$aside/body" generated.png
ask image/png "/generate?class=3&n=16&scale=4&seed=7"; cp "$aside/body" generated-grid.png
file generated.png generated-grid.png 2>/dev/null || ls -l generated.png generated-grid.png
echo "# previews during generation, as server-sent events"
: > "$aside/body"
"${curl[@]}" -N "$url/generate?class=3&steps=20&stream=true" | awk '/^(event|data|:)/ {print substr($0, 1, 120); fflush()}'
check text/event-stream
