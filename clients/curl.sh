#!/usr/bin/env bash
# Everything the server does, with curl: clients/curl.sh cat.png [http://localhost:8000]
set -euo pipefail
picture=${1:?usage: clients/curl.sh PICTURE [URL]}
url=${2:-http://localhost:8000}

echo "# the picture as the body"
curl --fail-with-body -sS --data-binary @"$picture" "$url/classify"; echo
echo "# as a form field"
curl --fail-with-body -sS -F image=@"$picture" "$url/classify"; echo
echo "# as base64 in JSON, one or several"
base64 < "$picture" | tr -d '\n' | sed 's/.*/{"image": "&"}/' | curl --fail-with-body -sS -H 'Content-Type: application/json' --data-binary @- "$url/energy"; echo
base64 < "$picture" | tr -d '\n' | sed 's/.*/{"images": ["&", "&"]}/' | curl --fail-with-body -sS -H 'Content-Type: application/json' --data-binary @- "$url/classify"; echo
echo "# a picture of class 3, and sixteen of them, large enough to look at"
curl --fail-with-body -sS "$url/generate?class=3" -o generated.png
curl --fail-with-body -sS "$url/generate?class=3&n=16&scale=4&seed=7" -o generated-grid.png
file generated.png generated-grid.png 2>/dev/null || ls -l generated.png generated-grid.png
echo "# the same, watched while it is drawn"
curl --fail-with-body -sSN "$url/generate?class=3&steps=20&stream=true" | cut -c1-120
