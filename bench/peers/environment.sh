#!/usr/bin/env bash
# The environment of one peer, in build/peers/NAME: the library, the plugin, and porthal as it stands in this clone.
set -euo pipefail
cd "$(dirname "$0")"
home=../../build/peers/$1
python3 -m venv "$home"
"$home/bin/pip" install -q -r requirements.txt -r "$1/requirements.txt"
if [ -e "$1/bare.txt" ]; then "$home/bin/pip" install -q --no-deps -r "$1/bare.txt"; fi # pins what its kernels do not need
"$home/bin/pip" install -q --no-deps -e "$1"
site=$("$home/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
printf '%s\n' "$PWD/common" "$(cd ../.. && pwd)" > "$site/porthal.pth"
touch "$home/ready"
